#!/usr/bin/env python
"""
Publishes a trained model on the Hugging Face Hub: the command `elastic-hf publish`.

    python examples/publish.py outputs/shop org/shop-recommender --dry_run          # what would be published
    python examples/publish.py outputs/shop org/shop-recommender --private --tag v1
"""

import sys

from elastic_hf.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))

#!/usr/bin/env python
"""
Trains a sequential recommender, evaluates it and recommends: the command `elastic-hf train`.

    python examples/run_seqrec.py                                       # the synthetic dataset, minutes on a CPU
    python examples/run_seqrec.py --train_file shop.csv --items_file titles.csv --output_dir outputs/shop
    python examples/run_seqrec.py examples/recipes/ml-1m-sasrec.yaml --seed 43    # a recipe, and what changes it
    torchrun --nproc_per_node 2 examples/run_seqrec.py

`--help` lists all arguments; the steps are in `elastic_hf/commands/train.py`. Other scripts that take recipes can
import `read_arguments`.
"""

import sys

from elastic_hf.__main__ import main
from elastic_hf.commands.arguments import read_arguments


__all__ = ["main", "read_arguments"]


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

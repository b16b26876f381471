#!/usr/bin/env python
"""
Writes a trained recommender as ONNX programs: the command `elastic-hf export`.

    python examples/export_onnx.py --model_name_or_path outputs/shop --output_dir outputs/shop-onnx
"""

import sys

from elastic_hf.__main__ import main


if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))

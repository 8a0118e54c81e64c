"""Encodes into a cache: torchrun launch/precompute.py --base configs/sft.yaml data.cache_dir=cache"""

import sys

from sat_train.cli.ranks import precompute

if __name__ == "__main__":
    sys.exit(precompute())

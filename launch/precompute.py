"""Encodes into a cache: torchrun launch/precompute.py --base configs/sft.yaml data.cache_dir=cache"""

import sys

from sat_train.cli.precompute_cache import main

if __name__ == "__main__":
    sys.exit(main())

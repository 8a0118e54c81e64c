"""Samples: torchrun launch/sample_video.py --base configs/sample.yaml --prompt "a red ball bounces" """

import sys

from sat_train.cli.ranks import sample

if __name__ == "__main__":
    sys.exit(sample())

"""Trains: torchrun launch/train_video.py --base configs/sft.yaml"""

import sys

from sat_train.cli.ranks import train

if __name__ == "__main__":
    sys.exit(train())

"""Trains: torchrun launch/train_video.py --base configs/sft.yaml"""

import sys

from sat_train.cli.train import main

if __name__ == "__main__":
    sys.exit(main())

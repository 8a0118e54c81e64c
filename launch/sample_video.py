"""Samples: torchrun launch/sample_video.py --base configs/sample.yaml --prompt "a red ball bounces" """

import sys

from sat_train.cli.sample import main

if __name__ == "__main__":
    sys.exit(main())

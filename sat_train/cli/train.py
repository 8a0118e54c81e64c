"""Command `sat-train train`, which is also `launch/train_video.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sat_train.cli.ranks import run_on_ranks
from sat_train.cli.usage import print_usage, wants_help


def main(words: Sequence[str] | None = None) -> int:
    """Trains a model.

    Args:
        words: Command line without the program's name; None takes this process's.

    Returns:
        Exit code, see `run_on_ranks`.
    """
    arguments = sys.argv[1:] if words is None else words
    if wants_help(arguments):
        print_usage("train")
        return 0
    return run_on_ranks("train", ("sat_train.training.build", "train"), arguments)

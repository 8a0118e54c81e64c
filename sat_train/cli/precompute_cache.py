"""Command `sat-train precompute`, which is also `launch/precompute.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sat_train.cli.ranks import run_on_ranks
from sat_train.cli.usage import print_usage, wants_help


def main(words: Sequence[str] | None = None) -> int:
    """Encodes the samples of a training run into `data.cache_dir`.

    Args:
        words: Command line without the program's name; None takes this process's.

    Returns:
        Exit code, see `run_on_ranks`.
    """
    arguments = sys.argv[1:] if words is None else words
    if wants_help(arguments):
        print_usage("precompute")
        return 0
    work = ("sat_train.encoding.precompute", "precompute_until_stopped")
    return run_on_ranks("precompute", work, arguments)

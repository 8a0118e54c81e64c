"""Command `sat-train sample`, which is also `launch/sample_video.py`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sat_train.cli.ranks import run_on_ranks
from sat_train.cli.usage import print_usage, wants_help


def main(words: Sequence[str] | None = None) -> int:
    """Samples videos.

    Args:
        words: Command line without the program's name; None takes this process's.

    Returns:
        Exit code, see `run_on_ranks`.
    """
    arguments = sys.argv[1:] if words is None else words
    if wants_help(arguments):
        print_usage("sample")
        return 0
    return run_on_ranks("sample", ("sat_train.cli.sample_videos", "sample"), arguments)

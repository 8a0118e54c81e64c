"""`launch/sample_video.py` and `sat-train sample`."""

from __future__ import annotations

from collections.abc import Sequence

from sat_train.cli.ranks import run_on_ranks


def main(words: Sequence[str] | None = None) -> int:
    """Draws videos.

    Args:
        words: Command line without the program's name; None takes this process's.

    Returns:
        Exit code, see `run_on_ranks`.
    """
    return run_on_ranks("sample", ("sat_train.cli.sample_videos", "sample"), words)

"""`launch/precompute.py` and `sat-train precompute`."""

from __future__ import annotations

from collections.abc import Sequence

from sat_train.cli.ranks import run_on_ranks


def main(words: Sequence[str] | None = None) -> int:
    """Encodes what training will read into `data.cache_dir`.

    Args:
        words: Command line without the program's name; None takes this process's.

    Returns:
        Exit code, see `run_on_ranks`.
    """
    return run_on_ranks("precompute", ("sat_train.training.precompute", "precompute_until_stopped"), words)

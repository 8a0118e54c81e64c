"""Counts clips by the names of files, without opening one."""

from __future__ import annotations

from collections.abc import Sequence

from sat_train.config.summary import ClipCounts
from sat_train.data.sources.read import read_source, split_source


def count_clips(train: Sequence[str], valid: Sequence[str] | None, *, shares: Sequence[float]) -> ClipCounts:
    """Counts the clips of training and validation data.

    Args:
        train: Entries of `args.train_data`.
        valid: Entries of `args.valid_data`; None: a share of `train`.
        shares: Of `train` for training, validation and test, where `valid` is None.

    Raises:
        DataError: An entry cannot be read.
    """
    sources = [read_source(entry) for entry in train]
    if valid:
        return ClipCounts(sum(map(len, sources)), sum(len(read_source(entry)) for entry in valid))
    parts = [[split_source(source, shares, part) for source in sources] for part in (0, 1)]
    return ClipCounts(*(sum(map(len, part)) for part in parts))

"""Counts clips by file names, without opening them."""

from __future__ import annotations

from collections.abc import Sequence

from sat_train.config.summary import ClipCounts
from sat_train.data.sources.read import read_sources
from sat_train.data.sources.records import DEFAULT_OPTIONS, SourceOptions


def count_clips(
    train: Sequence[str],
    valid: Sequence[str] | None,
    *,
    shares: Sequence[float],
    options: SourceOptions = DEFAULT_OPTIONS,
) -> ClipCounts:
    """Counts the clips of training and validation data.

    Args:
        train: Entries of `args.train_data`.
        valid: Entries of `args.valid_data`; None: a share of `train`.
        shares: Of `train` for training, validation and test, where `valid` is None.
        options: Options for reading them.

    Raises:
        DataError: A source cannot be read, or a part is empty.
    """
    if valid:
        parts = [
            read_sources(entries, options, shares=None, part=i) for i, entries in enumerate((train, valid))
        ]
    else:
        wanted = [0, 1] if shares[1] else [0]
        parts = [read_sources(train, options, shares=shares, part=part) for part in wanted]
    counts = [sum(map(len, part)) for part in parts]
    return ClipCounts(counts[0], counts[1] if len(counts) > 1 else 0)

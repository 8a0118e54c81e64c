"""Weights between sizes of the model axis, lazily.

The rules of which weight is cut how are the model's (`models.dit.sharding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from sat_train.checkpoint.lazy import Cut, Entry, LazyWeights, cut_tensor, sliced
from sat_train.errors import CheckpointError
from sat_train.models.dit.sharding import (
    check_divisible,
    full_shape,
    tensor_parallel_cut,
    tensor_parallel_merge,
)


def merge_slices(slices: Sequence[LazyWeights], *, where: str) -> LazyWeights:
    """Returns whole weights, given those of every rank of the model axis in rank order.

    Raises:
        CheckpointError: The ranks hold different names.
    """
    if len(slices) == 1:
        return slices[0]
    for rank, other in enumerate(slices):
        if other.keys() != slices[0].keys():
            differing = sorted(other.keys() ^ slices[0].keys())
            raise CheckpointError(f"{where}: ranks 0 and {rank} of the model axis differ in {differing[:5]}")
    entries = {}
    for key, entry in slices[0].entries.items():
        whole = full_shape(key, entry.shape, len(slices))
        entries[key] = Entry(
            whole, entry.dtype, partial(_read_merged, key, [part.entries[key] for part in slices])
        )
    return LazyWeights(entries, where=where)


def slice_weights(weights: LazyWeights, *, rank: int, size: int) -> LazyWeights:
    """Returns the slice of every weight that one rank of the model axis holds; only that is read.

    Raises:
        CheckpointError: A weight cannot be cut into `size` equal slices.
    """
    if size == 1:
        return weights
    entries = {key: _slice_entry(key, entry, rank, size) for key, entry in weights.entries.items()}
    return LazyWeights(entries, where=weights.where)


def _slice_entry(key: str, entry: Entry, rank: int, size: int) -> Entry:
    rule = tensor_parallel_cut(key)
    if rule is None:
        return entry
    dim, parts = rule
    check_divisible(key, tuple(entry.shape), dim=dim, parts=parts, size=size)
    return sliced(entry, Cut(dim, parts, rank, size))


def _read_merged(key: str, entries: Sequence[Entry], cut: Cut | None) -> Tensor:
    return cut_tensor(tensor_parallel_merge(key, [entry.read(None) for entry in entries]), cut)

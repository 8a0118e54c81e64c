"""Converts weights between sizes of the model axis, lazily.

The model itself defines how each weight is sharded (`models.dit.sharding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from sat_train.errors import CheckpointError
from sat_train.models.dit.sharding import (
    check_divisible,
    full_shape,
    merge_shards,
    tensor_parallel_layout,
)
from sat_train.weights.lazy import LazyTensor, LazyWeights, Shard, shard_lazily, shard_tensor


def merge_slices(slices: Sequence[LazyWeights], *, where: str) -> LazyWeights:
    """Merges the weights of all ranks of the model axis, given in rank order.

    Raises:
        CheckpointError: The ranks hold different names.
    """
    if len(slices) == 1:
        return slices[0]
    for rank, other in enumerate(slices):
        if other.keys() != slices[0].keys():
            differing = sorted(other.keys() ^ slices[0].keys())
            raise CheckpointError(f"{where}: ranks 0 and {rank} of the model axis differ in {differing[:5]}")
    lazy_tensors = {}
    for key, lazy in slices[0].tensors.items():
        whole = full_shape(key, lazy.shape, len(slices))
        lazy_tensors[key] = LazyTensor(
            whole, lazy.dtype, partial(_read_merged, key, [part.tensors[key] for part in slices])
        )
    return LazyWeights(lazy_tensors, where=where)


def slice_weights(weights: LazyWeights, *, rank: int, size: int) -> LazyWeights:
    """Returns one rank's slice of every weight; only the slices are read.

    Raises:
        CheckpointError: A weight cannot be split into `size` equal shards.
    """
    if size == 1:
        return weights
    lazy_tensors = {key: _shard_lazily(key, lazy, rank, size) for key, lazy in weights.tensors.items()}
    return LazyWeights(lazy_tensors, where=weights.where)


def _shard_lazily(key: str, lazy: LazyTensor, rank: int, size: int) -> LazyTensor:
    rule = tensor_parallel_layout(key)
    if rule is None:
        return lazy
    dim, parts = rule
    check_divisible(key, tuple(lazy.shape), dim=dim, parts=parts, size=size)
    return shard_lazily(lazy, Shard(dim, parts, rank, size))


def _read_merged(key: str, lazy_tensors: Sequence[LazyTensor], shard: Shard | None) -> Tensor:
    return shard_tensor(merge_shards(key, [lazy.read(None) for lazy in lazy_tensors]), shard)

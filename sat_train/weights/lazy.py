"""Weights by name, each read when it is asked for: a 5B model passes through without being held twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sat_train.errors import CheckpointError
from sat_train.weights.names import Shape


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that one rank of the model axis holds.

    Args:
        dim: Dim that is sharded.
        parts: Equal parts of that dim, each of which is sharded by itself.
        rank: Rank on the model axis.
        size: Ranks on the model axis.
    """

    dim: int
    parts: int
    rank: int
    size: int

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Returns the (start, stop) of each part's share along a dim of `length`."""
        step = length // (self.parts * self.size)
        starts = [(part * self.size + self.rank) * step for part in range(self.parts)]
        return [(start, start + step) for start in starts]


@dataclass(frozen=True)
class LazyTensor:
    """One tensor that has not been read.

    Args:
        shape: Its whole shape.
        dtype: Its dtype.
        read: Reads it: the whole, or one rank's shard.
    """

    shape: Shape
    dtype: torch.dtype
    read: Callable[[Shard | None], Tensor]


class LazyWeights(Mapping[str, Tensor]):
    """A state dict whose tensors are read at each access. Do not hold on to more than are needed.

    Args:
        tensors: What there is, by name.
        where: Where it comes from, for messages.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], *, where: str) -> None:
        self.tensors = dict(tensors)
        self.where = where

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key].read(None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Returns the shape of every tensor, without reading any."""
        return {key: lazy.shape for key, lazy in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(math.prod(lazy.shape) * lazy.dtype.itemsize for lazy in self.tensors.values())

    def select(self, rename: Callable[[str], str | None]) -> LazyWeights:
        """Returns those that `rename` gives a name, under that name."""
        names = {key: rename(key) for key in self.tensors}
        chosen = {name: self.tensors[key] for key, name in names.items() if name is not None}
        return LazyWeights(chosen, where=self.where)

    def cast(self, dtype: torch.dtype | None) -> LazyWeights:
        """Returns these in another dtype, counters as they are; None leaves all as they are."""
        if dtype is None:
            return self
        tensors = {
            key: replace(lazy, dtype=dtype, read=partial(_read_cast, key, lazy, dtype))
            if lazy.dtype.is_floating_point
            else lazy
            for key, lazy in self.tensors.items()
        }
        return LazyWeights(tensors, where=self.where)

    def overlaid(self, other: LazyWeights) -> LazyWeights:
        """Returns these and the other's; the other's where both have a name."""
        return LazyWeights({**self.tensors, **other.tensors}, where=f"{self.where} with {other.where}")


def lazy_tensor(tensor: Tensor) -> LazyTensor:
    """Returns a lazy tensor for one that is in memory, or mapped from a file."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda shard: shard_tensor(tensor, shard))


def from_tensors(tensors: Mapping[str, Tensor], *, where: str) -> LazyWeights:
    """Returns a state dict as lazy weights."""
    return LazyWeights({key: lazy_tensor(tensor) for key, tensor in tensors.items()}, where=where)


def shard_tensor(tensor: Tensor, shard: Shard | None) -> Tensor:
    """Returns one rank's shard: a view where one suffices."""
    if shard is None:
        return tensor
    slices = [
        tensor.narrow(shard.dim, start, stop - start) for start, stop in shard.spans(tensor.shape[shard.dim])
    ]
    return slices[0] if len(slices) == 1 else torch.cat(slices, shard.dim)


def _read_cast(key: str, lazy: LazyTensor, dtype: torch.dtype, shard: Shard | None) -> Tensor:
    tensor = lazy.read(shard)
    result = tensor.to(dtype)
    is_narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if is_narrower and not torch.equal(result.isinf(), tensor.isinf()):
        raise CheckpointError(
            f"{key} has values beyond the range of {str(dtype).removeprefix('torch.')}",
            expected="weights that the dtype can hold",
            remedy="choose --dtype bf16 or fp32",
        )
    return result


def shard_lazily(lazy: LazyTensor, shard: Shard) -> LazyTensor:
    """Returns one rank's shard, unread."""
    shape = list(lazy.shape)
    shape[shard.dim] //= shard.size
    return replace(lazy, shape=tuple(shape), read=lambda again: shard_tensor(lazy.read(shard), again))


def check_same(ours: LazyWeights, written: LazyWeights) -> None:
    """Compares what was to be written with what reads back, value for value.

    Raises:
        CheckpointError: They differ, which is a fault of the disk or of this program.
    """
    differing = sorted(ours.keys() ^ written.keys()) or [
        key for key in ours if not _same(ours[key], written[key])
    ]
    if differing:
        raise CheckpointError(
            f"{written.where} does not read back as it was written: {', '.join(differing[:5])}",
            remedy="try again on another disk, and report it if it happens again",
        )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, so that a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))

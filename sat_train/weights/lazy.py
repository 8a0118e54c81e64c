"""State dicts whose tensors are read on access, so that a 5B model is never held in memory twice."""

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
        dim: Sharded dim.
        parts: Number of equal parts of that dim, each of which is sharded separately.
        rank: Rank on the model axis.
        size: Ranks on the model axis.
    """

    dim: int
    parts: int
    rank: int
    size: int

    def spans(self, length: int) -> list[tuple[int, int]]:
        """Returns the (start, stop) of this rank's share of each part, along a dim of `length`."""
        step = length // (self.parts * self.size)
        starts = [(part * self.size + self.rank) * step for part in range(self.parts)]
        return [(start, start + step) for start in starts]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that has not been read yet.

    Args:
        shape: Shape of the whole tensor.
        dtype: Dtype of the tensor.
        read: Reads the whole tensor, or one rank's shard.
    """

    shape: Shape
    dtype: torch.dtype
    read: Callable[[Shard | None], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class LazyWeights(Mapping[str, Tensor]):
    """A state dict whose tensors are read on every access; do not keep more of them than you need.

    Args:
        tensors: The tensors by name.
        where: Their source, for messages.
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
        """Total size of all tensors in bytes."""
        return sum(lazy.num_bytes for lazy in self.tensors.values())

    def select(self, rename: Callable[[str], str | None]) -> LazyWeights:
        """Returns the tensors for which `rename` returns a name, under that name."""
        names = {key: rename(key) for key in self.tensors}
        chosen = {name: self.tensors[key] for key, name in names.items() if name is not None}
        return LazyWeights(chosen, where=self.where)

    def cast(self, dtype: torch.dtype | None) -> LazyWeights:
        """Returns the weights cast to `dtype`, integers unchanged; None changes nothing."""
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
        """Returns the union of both; `other` wins where a name is in both."""
        if not other:
            return self
        return LazyWeights({**self.tensors, **other.tensors}, where=f"{self.where} with {other.where}")


def lazy_tensor(tensor: Tensor) -> LazyTensor:
    """Wraps a tensor that is in memory or memory-mapped."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda shard: shard_tensor(tensor, shard))


def from_tensors(tensors: Mapping[str, Tensor], *, where: str) -> LazyWeights:
    """Wraps a state dict."""
    return LazyWeights({key: lazy_tensor(tensor) for key, tensor in tensors.items()}, where=where)


def shard_tensor(tensor: Tensor, shard: Shard | None) -> Tensor:
    """Returns one rank's shard, as a view if possible."""
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
    """Returns one rank's shard without reading it."""
    shape = list(lazy.shape)
    shape[shard.dim] //= shard.size
    return replace(lazy, shape=tuple(shape), read=lambda again: shard_tensor(lazy.read(shard), again))


def check_same(ours: LazyWeights, written: LazyWeights) -> None:
    """Compares the weights with what was read back from disk, value for value.

    Raises:
        CheckpointError: They differ, because of the disk or a bug of this program.
    """
    differing = sorted(ours.keys() ^ written.keys()) or [
        key for key in ours if not _same(ours[key], written[key])
    ]
    if differing:
        raise CheckpointError(
            f"{written.where} does not read back as it was written: {', '.join(differing[:5])}",
            remedy="try another disk, and report a bug if it happens again",
        )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, so that a NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))

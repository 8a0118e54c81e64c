"""Tensor-parallel sharding of each weight, as pure functions of a key and a tensor."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from sat_train.config.parts.adapter_parts import find_adapter_tensor
from sat_train.errors import CheckpointError

# (key pattern, sharded dim, equal parts of it that are sharded separately); weights that no pattern matches
# are replicated. SAT shards q, k and v of the fused weight each by heads: a rank has its heads of all three.
_LAYOUTS = (
    (r"attention\.query_key_value\.(weight|bias)$", 0, 3),
    (r"mlp\.dense_h_to_4h\.(weight|bias)$", 0, 1),
    (r"(attention\.dense|mlp\.dense_4h_to_h)\.weight$", 1, 1),
)


def tensor_parallel_layout(key: str) -> tuple[int, int] | None:
    """Returns (dim, parts) for a sharded weight, None for a replicated one.

    An adapter's tensor is sharded on the same side as its layer.
    """
    if adapter := find_adapter_tensor(key):
        layer, tensor = adapter
        of_layer = tensor_parallel_layout(f"{layer}.weight")
        side = "" if of_layer is None else ("out", "in")[of_layer[0]]
        return (of_layer[0], 1) if of_layer is not None and tensor.shard == side else None
    return next(((dim, parts) for pattern, dim, parts in _LAYOUTS if re.search(pattern, key)), None)


def full_shape(key: str, shape: Sequence[int], size: int) -> tuple[int, ...]:
    """Returns the shape of the whole weight, given that of one of `size` shards."""
    layout = tensor_parallel_layout(key)
    return tuple(length * size if layout and dim == layout[0] else length for dim, length in enumerate(shape))


def shard_weight(key: str, tensor: Tensor, *, rank: int, size: int) -> Tensor:
    """Returns the shard that one rank of the model axis holds.

    Args:
        key: SAT key, with or without a prefix.
        tensor: The whole weight.
        rank: Rank on the model axis.
        size: Ranks on the model axis.

    Returns:
        A view where one suffices, else a copy.

    Raises:
        CheckpointError: The weight cannot be split into `size` equal shards.
    """
    layout = tensor_parallel_layout(key)
    if layout is None or size == 1:
        return tensor
    dim, parts = layout
    check_divisible(key, tuple(tensor.shape), dim=dim, parts=parts, size=size)
    slices = [part.chunk(size, dim)[rank] for part in tensor.chunk(parts, dim)]
    return slices[0] if parts == 1 else torch.cat(slices, dim)


def merge_shards(key: str, slices: Sequence[Tensor]) -> Tensor:
    """Returns the whole weight, given every rank's shard in rank order: undoes `shard_weight`."""
    layout = tensor_parallel_layout(key)
    if layout is None or len(slices) == 1:
        return slices[0]
    dim, parts = layout
    pieces = [part.chunk(parts, dim) for part in slices]
    return torch.cat([piece[index] for index in range(parts) for piece in pieces], dim)


def check_divisible(key: str, shape: tuple[int, ...], *, dim: int, parts: int, size: int) -> None:
    """Checks that a weight can be split into `size` equal shards.

    Raises:
        CheckpointError: It cannot.
    """
    if shape[dim] % (parts * size):
        raise CheckpointError(
            f"{key} of shape {shape} cannot be sharded for model_parallel_size = {size}",
            expected=f"dim {dim} divisible by {parts * size}",
        )

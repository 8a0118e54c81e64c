"""Low-rank updates, independent of file formats: `weight + scale * up @ down`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The update of one weight, or of one of the equal parts of its output.

    Args:
        down: [rank, in].
        up: [out, rank].
        scale: Factor on `up @ down`: alpha / rank where a file stores alpha.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Inner width."""
        return int(self.down.shape[0])

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the change of the weight, [out, in], computed in `dtype`."""
        return (self.up.to(dtype) @ self.down.to(dtype)) * self.scale

    def scaled_up(self, scale: float) -> Tensor:
        """Returns the `up` that has the same effect at another scale, fp32; bit-equal at its own scale."""
        return self.up.float() if scale == self.scale else self.up.float() * (self.scale / scale)


# For each adapted layer, under SAT's name: the update of each equal part of its output; None: no update.
Updates = dict[str, tuple[LowRank | None, ...]]


def strengthened(updates: Updates, strength: float) -> Updates:
    """Returns the updates times a factor."""
    return {
        layer: tuple(part and replace(part, scale=part.scale * strength) for part in parts)
        for layer, parts in updates.items()
    }


def stacked(first: Updates, second: Updates) -> Updates:
    """Returns the sum of two sets of updates; where both have one, its rank is the sum of the ranks."""
    result = dict(first)
    for layer, parts in second.items():
        before = result.get(layer, (None,) * len(parts))
        assert len(before) == len(parts), f"{layer} is split into {len(before)} and into {len(parts)} parts"
        result[layer] = tuple(map(_sum, before, parts))
    return result


def highest_rank(updates: Updates) -> int:
    """Returns the largest rank of all parts."""
    return max(part.rank for parts in updates.values() for part in parts if part is not None)


def common_scale(updates: Updates) -> float:
    """Returns the scale that all parts have, else 1."""
    scales = {part.scale for parts in updates.values() for part in parts if part is not None}
    return scales.pop() if len(scales) == 1 else 1.0


def _sum(first: LowRank | None, second: LowRank | None) -> LowRank | None:
    if first is None or second is None:
        return first or second
    scale = first.scale if first.scale == second.scale else 1.0
    return LowRank(
        torch.cat([first.down.float(), second.down.float()]),
        torch.cat([first.scaled_up(scale), second.scaled_up(scale)], dim=1),
        scale,
    )


def whole_delta(parts: tuple[LowRank | None, ...], out_features: int, dtype: torch.dtype) -> Tensor:
    """Returns the change of a layer's whole weight, [out_features, in]."""
    some = next(part for part in parts if part is not None)
    rows = out_features // len(parts)
    unchanged = torch.zeros(rows, some.down.shape[1], dtype=dtype)
    return torch.cat([unchanged if part is None else part.delta(dtype) for part in parts])


def misfits(updates: Updates, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns a message for each update that does not fit its layer.

    Args:
        updates: The updates.
        shapes: Shape of the weight of each existing layer, [out, in].
    """
    faults = []
    for layer, parts in updates.items():
        shape = shapes.get(layer)
        if shape is None:
            faults.append(f"{layer} does not exist")
            continue
        expected = (shape[0] // len(parts), *shape[1:])
        for part in parts:
            if part is not None and (part.up.shape[0], part.down.shape[1]) != expected:
                size = [part.up.shape[0], part.down.shape[1]]
                faults.append(f"{layer} has an update of shape {size}, and its weight is {list(expected)}")
    return faults

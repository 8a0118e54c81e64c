"""Low-rank updates of weights, independent of file formats: `weight + scale * up @ down`, and DoRA's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sat_train.errors import CheckpointError


@dataclass(frozen=True)
class LowRank:
    """The update of one weight, or of one of the equal parts of its output.

    Args:
        down: [rank, in].
        up: [out, rank].
        scale: Factor on `up @ down`: alpha / rank where a file stores alpha.
        magnitude: [out], or None. With it the update is DoRA's: each row of `weight + scale * up @ down` gets
            the length that the row of the weight has, plus this.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Inner width."""
        return int(self.down.shape[0])

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns `scale * up @ down`, [out, in], computed in `dtype`."""
        return (self.up.to(dtype) @ self.down.to(dtype)) * self.scale

    def added_to(self, weight: Tensor) -> Tensor:
        """Returns a weight with the update, [out, in], computed in its dtype."""
        total = weight + self.delta(weight.dtype)
        if self.magnitude is None:
            return total
        factor: Tensor = self.lengths(weight) / torch.linalg.vector_norm(total, dim=1)
        return total * factor[:, None]

    def lengths(self, weight: Tensor) -> Tensor:
        """Returns the lengths of the rows of the weight after a DoRA update, [out]."""
        assert self.magnitude is not None, "only DoRA sets the lengths of rows"
        own: Tensor = torch.linalg.vector_norm(weight, dim=1)
        return own + self.magnitude.to(weight.dtype)

    def scaled_up(self, scale: float) -> Tensor:
        """Returns the `up` that has the same effect at another scale, fp32; bit-equal at its own scale."""
        return self.up.float() if scale == self.scale else self.up.float() * (self.scale / scale)


# For each adapted layer, under SAT's name: the update of each equal part of its output; None: no update.
Parts = tuple[LowRank | None, ...]
Updates = dict[str, Parts]


def strengthened(updates: Updates, strength: float) -> Updates:
    """Returns the updates times a factor.

    Raises:
        CheckpointError: They are DoRA's, which a factor other than 1 does not weaken.
    """
    if strength == 1.0:
        return updates
    _check_additive(updates, f"strength {strength:g}")
    return {
        layer: tuple(part and replace(part, scale=part.scale * strength) for part in parts)
        for layer, parts in updates.items()
    }


def stacked(first: Updates, second: Updates) -> Updates:
    """Returns the exact sum of two sets of updates; where both have one, its rank is the sum of the ranks.

    Raises:
        CheckpointError: One of them is DoRA's, and the other is not empty.
    """
    if not first or not second:
        return first or second
    for updates in (first, second):
        _check_additive(updates, "a sum with other adapters")
    result = dict(first)
    for layer, parts in second.items():
        before = result.get(layer, (None,) * len(parts))
        assert len(before) == len(parts), f"{layer} is split into {len(before)} and into {len(parts)} parts"
        result[layer] = tuple(map(_sum, before, parts))
    return result


def truncated(updates: Updates, rank: int) -> Updates:
    """Returns the closest updates of a lower rank, by the singular value decomposition of each.

    Raises:
        CheckpointError: They are DoRA's.
    """
    _check_additive(updates, f"rank {rank}")
    return {
        layer: tuple(part and (_truncated(part, rank) if part.rank > rank else part) for part in parts)
        for layer, parts in updates.items()
    }


def _truncated(part: LowRank, rank: int) -> LowRank:
    # up @ down = (q_up r_up) (q_down r_down)^T: the matrix to decompose is rank x rank
    q_up, r_up = torch.linalg.qr(part.up.double() * part.scale)
    q_down, r_down = torch.linalg.qr(part.down.double().T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    root = s[:rank].sqrt()
    up, down = q_up @ (u[:, :rank] * root), (root[:, None] * vh[:rank]) @ q_down.T
    return LowRank(down.float(), up.float(), 1.0)


def is_dora(updates: Updates) -> bool:
    """Returns whether updates set the lengths of rows."""
    return any(
        part is not None and part.magnitude is not None for parts in updates.values() for part in parts
    )


def _check_additive(updates: Updates, what: str) -> None:
    if is_dora(updates):
        raise CheckpointError(
            f"{what} is not defined for DoRA adapters: they set the lengths of the weight's rows",
            expected="DoRA adapters alone, at strength 1",
            remedy="merge them into the weights first (sat-train convert RUN --merge-lora)",
        )


def highest_rank(updates: Updates) -> int:
    """Returns the largest rank of all parts."""
    return max(part.rank for parts in updates.values() for part in parts if part is not None)


def common_scale(updates: Updates) -> float:
    """Returns the scale that all parts have, else 1."""
    scales = scales_of(updates)
    return scales[0] if len(scales) == 1 else 1.0


def scales_of(updates: Updates) -> list[float]:
    """Returns the different scales, the smallest first."""
    return sorted({part.scale for parts in updates.values() for part in parts if part is not None})


def _sum(first: LowRank | None, second: LowRank | None) -> LowRank | None:
    if first is None or second is None:
        return first or second
    scale = first.scale if first.scale == second.scale else 1.0
    return LowRank(
        torch.cat([first.down.float(), second.down.float()]),
        torch.cat([first.scaled_up(scale), second.scaled_up(scale)], dim=1),
        scale,
    )


def updated_weight(weight: Tensor, parts: Parts) -> Tensor:
    """Returns a layer's whole weight with the updates of its parts, computed in its dtype."""
    rows = weight.chunk(len(parts))
    return torch.cat(
        [own if part is None else part.added_to(own) for own, part in zip(rows, parts, strict=True)]
    )


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

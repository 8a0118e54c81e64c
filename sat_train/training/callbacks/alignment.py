"""Does a condition lie where the clip shows it? Read from the latents alone, without the network.

A network that is trained on a control that comes late, or is cropped differently, learns to look elsewhere,
so its loss need not tell. But where a clip changes, its control changes too, if they are aligned: the size of
the changes of both, on the grid of the latent, is correlated best with no move at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sat_train.encoding.conditions.condition import Encoding

_TIME, _ROWS, _COLUMNS = 1, 2, 3  # axes of a map [b, t, h, w]
_LEAST = 4  # places along an axis, so that some are left between the edges


@dataclass(frozen=True)
class Displacement:
    """A move of a map by one place along an axis.

    Args:
        axis: The axis.
        first_half: Places by which its first half moves, towards larger indices.
        second_half: The same of the second half; other than of the first where a picture is squeezed.
    """

    axis: int
    first_half: int
    second_half: int


DISPLACEMENTS: Mapping[str, Displacement] = {
    "later": Displacement(_TIME, 1, 1),
    "earlier": Displacement(_TIME, -1, -1),
    "down": Displacement(_ROWS, 1, 1),
    "up": Displacement(_ROWS, -1, -1),
    "to the right": Displacement(_COLUMNS, 1, 1),
    "to the left": Displacement(_COLUMNS, -1, -1),
    "lower in height": Displacement(_ROWS, 1, -1),
    "taller": Displacement(_ROWS, -1, 1),
    "narrower": Displacement(_COLUMNS, 1, -1),
    "wider": Displacement(_COLUMNS, -1, 1),
}


def alignment_gains(clip_btchw: Tensor, encoding: Encoding) -> dict[str, Tensor]:
    """Returns by how much the correlation with the clip rises when a condition is moved, by displacement.

    Args:
        clip_btchw: Latent of the clips.
        encoding: The condition, batch first; tensors with the clip's frames, rows and columns count.

    Returns:
        float64 `[b]` each; empty where the condition does not lie on the clip's grid.
    """
    b, t, _, h, w = clip_btchw.shape
    on_grid = [
        tensor.double()
        for name, tensor in encoding.items()
        if name != "logvar" and tensor.dim() == 5 and (*tensor.shape[:2], *tensor.shape[3:]) == (b, t, h, w)
    ]
    if not on_grid:
        return {}
    clip, condition = clip_btchw.double(), torch.cat(on_grid, dim=2)
    gains = {}
    for name, displacement in DISPLACEMENTS.items():
        own, other = _changes(clip, displacement.axis), _changes(condition, displacement.axis)
        if own.shape[displacement.axis] >= _LEAST:
            gains[name] = _gain(own, other, displacement)
    return gains


def _changes(latent_btchw: Tensor, axis: int) -> Tensor:
    """Returns the size of the changes: from frame to frame, or for moves in space between neighbours."""
    if axis == _TIME:
        return latent_btchw.diff(dim=1).square().sum(dim=2).sqrt()
    down = latent_btchw.diff(dim=3).square().sum(dim=2)
    right = latent_btchw.diff(dim=4).square().sum(dim=2)
    return (down[..., :-1] + right[..., :-1, :]).sqrt()


def _gain(clip_bthw: Tensor, condition_bthw: Tensor, displacement: Displacement) -> Tensor:
    """Returns the correlation with the moved condition minus that with the condition as it is."""
    axis, size = displacement.axis, clip_bthw.shape[displacement.axis]
    place = torch.arange(1, size - 1, device=clip_bthw.device)  # the edges have no neighbour to come from
    moved_by = torch.where(place < size / 2, displacement.first_half, displacement.second_half)
    clip, here, moved = (
        each.index_select(axis, index).flatten(1)
        for each, index in ((clip_bthw, place), (condition_bthw, place), (condition_bthw, place - moved_by))
    )
    return _correlation(clip, moved) - _correlation(clip, here)


def _correlation(x_bn: Tensor, y_bn: Tensor) -> Tensor:
    """Returns the correlation of each row; 0 where one of them is constant."""
    x_bn, y_bn = (each - each.mean(dim=1, keepdim=True) for each in (x_bn, y_bn))
    scale = (x_bn.square().sum(dim=1) * y_bn.square().sum(dim=1)).sqrt()
    return torch.where(
        scale > 0, (x_bn * y_bn).sum(dim=1) / scale.clamp_min(torch.finfo(scale.dtype).tiny), 0.0
    )

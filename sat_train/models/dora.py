"""DoRA: LoRA changes the direction of each row of a weight, and a vector its length.

    W' = m * (W + scale * B @ A) / |W + scale * B @ A|,    m = |W| + magnitude,    |.| the length of a row

`magnitude` begins at zero, so a new adapter changes nothing, bit for bit, and in half precision m keeps small
changes that would be lost next to |W|. As in the paper, the denominator counts as a constant in the gradient.
Dropout acts in front of A alone.

Source: arXiv:2402.09353, equation 5 and section 4.3; its rows and columns are those of the transposed weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sat_train.config.parts.adapter_parts import AdapterParams
from sat_train.models.adapter import AdaptedLayer, LinearShape
from sat_train.models.lora import Lora, Matrices
from sat_train.models.lora import read as read_lora
from sat_train.models.low_rank import LowRank, Parts


class Magnitude(Matrices):
    """Changes of the lengths of rows, fp32 `[out / parts]` each."""

    def forward(self, own: Tensor, turned: Tensor) -> Tensor:
        """Returns the factor on each row of `W + scale * B @ A`, less 1, fp32 `[out]`.

        Args:
            own: Lengths of the rows of W, fp32 `[out]`.
            turned: Lengths of the rows of `W + scale * B @ A`.
        """
        return (own - turned + torch.cat(self.all())) / turned


class Dora(Lora):
    """A low-rank update with the lengths of the rows apart."""

    def __init__(self, layer: LinearShape, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(layer, rank=rank, scale=scale, dropout=dropout)
        rows = layer.out_features // layer.parts
        self.magnitude = Magnitude(torch.empty(rows) for _ in range(layer.parts))

    def adapted(self, y: Tensor, x: Tensor, base: AdaptedLayer) -> Tensor:
        """Returns the layer's output: with the factor f, `y + (f - 1) * (y - bias) + f * delta(x)`."""
        gain: Tensor = self.magnitude(*self.lengths(base.weight)).to(y.dtype)
        plain = y if base.bias is None else y - base.bias
        return y + gain * plain + (1 + gain) * self.delta(x)

    @torch.no_grad()
    def lengths(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the lengths of the rows of a weight and of the weight with the update, fp32 `[out]`.

        `|w + s b A|^2 = |w|^2 + 2 s (A w) . b + s^2 b . (A A^T) b` needs no matrix of the weight's size but
        the weight; each term is a sum over the inputs, and so over the ranks that share them.
        """
        downs, ups = self.matrix_A(), self.matrix_B()
        own, turned = [], []
        for rows, down, up in zip(weight.float().chunk(len(ups)), downs, ups, strict=True):
            squares = rows.square().sum(1, keepdim=True)
            sums = self.layer.reduce(torch.cat([torch.cat([squares, rows @ down.T], dim=1), _gram(down)]))
            square, cross, gram = sums[: len(up), 0], sums[: len(up), 1:], sums[len(up) :, 1:]
            change = 2 * (cross * up).sum(1) + self.scale * ((up @ gram) * up).sum(1)
            own.append(square)
            turned.append((square + self.scale * change).clamp(min=0))
        return torch.cat(own).sqrt(), torch.cat(turned).sqrt()

    def merged(self, weight: Tensor) -> Tensor:
        """Returns the weight with the update, fp32, this rank's shard."""
        gain: Tensor = self.magnitude(*self.lengths(weight))
        return super().merged(weight) * (1 + gain)[:, None]

    def misfits(self, parts: Parts) -> list[str]:
        """Returns why updates cannot be loaded: other parts, or too high a rank."""
        return super().misfits(tuple(part and replace(part, magnitude=None) for part in parts))

    def load(self, parts: Parts, weight: Tensor) -> None:
        """Loads updates; a plain LoRA sets the lengths to those that it gives the rows."""
        super().load(parts, weight)
        own, turned = (lengths.chunk(len(parts)) for lengths in self.lengths(weight))
        for index, part in enumerate(parts):
            if part is not None:
                change = turned[index] - own[index]
                if part.magnitude is not None:
                    change = self.shard(f"magnitude.{index}", part.magnitude)
                getattr(self.magnitude, str(index)).copy_(change)


def _gram(down: Tensor) -> Tensor:
    """Returns `A A^T` behind a column of zeros."""
    return nn.functional.pad(down @ down.T, (1, 0))


def build(params: AdapterParams, layer: LinearShape) -> Dora:
    """Builds the adapter of a layer."""
    rank, scale = params.rank_of(layer.name), params.scale_of(layer.name)
    return Dora(layer, rank=rank, scale=scale, dropout=params.dropout)


def read(tensors: Mapping[str, Tensor], scale: float) -> tuple[LowRank, ...]:
    """Returns the update of each part, given the saved tensors of a layer's adapter."""
    matrices = {name: tensor for name, tensor in tensors.items() if not name.startswith("magnitude.")}
    pairs = enumerate(read_lora(matrices, scale))
    return tuple(replace(part, magnitude=tensors[f"magnitude.{index}"]) for index, part in pairs)

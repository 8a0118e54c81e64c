"""Low-rank adapters (LoRA) on SAT's linear layers.

An adapted layer keeps its own weight under its own key and gains `matrix_A.i` and `matrix_B.i`: one pair for
each of the equal parts of its output, three for the fused q, k, v. These are the names, shapes and scale
(alpha / rank) of SAT's `lora2`, so its checkpoints load.

Source: THUDM/SwissArmyTransformer@63dc23a `sat/model/finetune/lora2.py`; there the update of a row-parallel
    layer is not summed over the ranks. Rank-stabilised scale: arXiv:2312.03732.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from sat import mpu
from torch import Tensor, nn

from sat_train.config.parts.adapter_parts import AdapterParams
from sat_train.models.adapter import Adapter, LinearShape
from sat_train.models.dit.sharding import shard_weight
from sat_train.models.low_rank import LowRank, Parts


class Matrices(nn.Module):
    """Tensors named 0, 1, 2... They compute in a `forward` of their own, where ZeRO-3 gathers weights.

    Args:
        matrices: The tensors.
        trained: They are parameters; otherwise buffers.
    """

    def __init__(self, matrices: Iterable[Tensor], *, trained: bool = True) -> None:
        super().__init__()
        self.count = 0
        for matrix in matrices:
            if trained:
                self.register_parameter(str(self.count), nn.Parameter(matrix))
            else:
                self.register_buffer(str(self.count), matrix)
            self.count += 1

    def all(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Returns the tensors, by default in fp32."""
        return [getattr(self, str(index)).to(dtype) for index in range(self.count)]


class Down(Matrices):
    """The A matrices, fp32 `[rank, in]` each."""

    def forward(self, x: Tensor | None = None) -> Tensor:
        """Maps `[..., in]` to `[..., parts * rank]`; without an input returns a copy, [parts, rank, in]."""
        return torch.stack(self.all()) if x is None else F.linear(x, torch.cat(self.all(x.dtype)))


class Up(Matrices):
    """The B matrices, fp32 `[out / parts, rank]` each."""

    def forward(self, h: Tensor | None = None) -> Tensor:
        """Maps `[..., parts * rank]` to `[..., out]`; without an input returns a copy, [parts, out, rank]."""
        if h is None:
            return torch.stack(self.all())
        parts = h.chunk(self.count, dim=-1)
        outputs = [F.linear(part, matrix) for part, matrix in zip(parts, self.all(h.dtype), strict=True)]
        return torch.cat(outputs, dim=-1)


def empty_downs(layer: LinearShape, rank: int) -> Iterable[Tensor]:
    """Yields an A matrix for each part of a layer, this rank's shard, not set."""
    return (torch.empty(rank, layer.in_features, dtype=torch.float32) for _ in range(layer.parts))


def empty_ups(layer: LinearShape, rank: int) -> Iterable[Tensor]:
    """Yields a B matrix for each part of a layer, this rank's shard, not set."""
    rows = layer.out_features // layer.parts
    return (torch.empty(rows, rank, dtype=torch.float32) for _ in range(layer.parts))


def dropout_of(probability: float) -> nn.Module:
    """Returns dropout, or the identity, which keeps compiled graphs free of it."""
    return nn.Dropout(probability) if probability > 0 else nn.Identity()


class Lora(Adapter):
    """A low-rank update, initially zero: `B(reduce(A(dropout(x)) * scale))`.

    Args:
        layer: The layer.
        rank: Inner width.
        scale: Factor on the update.
        dropout: Probability that an input channel of the update is dropped in training.
    """

    def __init__(self, layer: LinearShape, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(layer, rank=rank, scale=scale)
        self.matrix_A, self.matrix_B = Down(empty_downs(layer, rank)), Up(empty_ups(layer, rank))
        self.lora_dropout = dropout_of(dropout)

    def delta(self, x: Tensor) -> Tensor:
        """Returns the update of the layer's output."""
        update: Tensor = self.matrix_B(self.layer.reduce(self.matrix_A(self.lora_dropout(x)) * self.scale))
        return update

    def merged(self, weight: Tensor) -> Tensor:
        """Returns the weight with the update, fp32, this rank's shard."""
        pairs = zip(self.matrix_B.all(), self.matrix_A.all(), strict=True)
        return weight.float() + torch.cat([up @ down for up, down in pairs]) * self.scale

    def misfits(self, parts: Parts) -> list[str]:
        """Returns why updates cannot be loaded: other parts, too high a rank, or lengths of rows."""
        name, some = self.layer.name, [part for part in parts if part is not None]
        if len(parts) != self.layer.parts:
            return [f"{name} has updates of {len(parts)} parts, and {self.layer.parts} adapters here"]
        if any(part.magnitude is not None for part in some):
            return [f"{name} has a DoRA update, and its adapter here is no Dora"]
        ranks = {part.rank for part in some if part.rank > self.rank}
        here = f"and its adapter here has rank {self.rank}"
        return [f"{name} has an update of rank {rank}, {here}" for rank in sorted(ranks)]

    def load(self, parts: Parts, weight: Tensor) -> None:
        """Loads updates; ranks beyond theirs begin at zero.

        The scale stays: the ratio of the two scales is folded into the B matrix.
        """
        for index, part in enumerate(parts):
            if part is not None:
                down, up = (getattr(side, str(index)) for side in (self.matrix_A, self.matrix_B))
                down[: part.rank].copy_(self.shard(f"matrix_A.{index}", part.down.float()))
                up.zero_()[:, : part.rank].copy_(self.shard(f"matrix_B.{index}", part.scaled_up(self.scale)))

    def shard(self, name: str, tensor: Tensor) -> Tensor:
        """Returns this rank's shard of one of the adapter's tensors."""
        size = int(mpu.get_model_parallel_world_size())
        rank = mpu.get_model_parallel_rank()
        return shard_weight(f"{self.layer.name}.{name}", tensor, rank=rank, size=size)


def build(params: AdapterParams, layer: LinearShape) -> Lora:
    """Builds the adapter of a layer."""
    rank, scale = params.rank_of(layer.name), params.scale_of(layer.name)
    return Lora(layer, rank=rank, scale=scale, dropout=params.dropout)


def read(tensors: Mapping[str, Tensor], scale: float) -> tuple[LowRank, ...]:
    """Returns the update of each part, given the saved tensors of a layer's adapter."""
    count = len(tensors) // 2
    pairs = ((tensors[f"matrix_A.{index}"], tensors[f"matrix_B.{index}"]) for index in range(count))
    return tuple(LowRank(down, up, scale) for down, up in pairs)

"""Low-rank adapters (LoRA) on SAT's linear layers.

An adapted layer keeps its own weight under its own key and gains `matrix_A.i` and `matrix_B.i`: one pair for
each of the equal parts of its output, three for the fused q, k, v. These are the names, shapes and scale
(alpha / rank) of SAT's `lora2`, so its checkpoints load.

Source: THUDM/SwissArmyTransformer@63dc23a `sat/model/finetune/lora2.py`; there the update of a row-parallel
    layer is not summed over the ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from sat import mpu
from torch import Tensor, nn

from sat_train.config.parts.adapter_parts import AdapterParams
from sat_train.errors import CheckpointError
from sat_train.models.adapter import (
    PARAMS_KEY,
    Adapter,
    LinearShape,
    adapted_layers,
    add_adapters,
    linear_layers,
)
from sat_train.models.dit.sharding import full_shape, shard_weight
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.low_rank import LowRank, Updates, common_scale, highest_rank, misfits

DEFAULT_TARGETS = (r"attention\.query_key_value$", r"attention\.dense$")


class _Matrices(nn.Module):
    """Parameters named 0, 1, 2... They compute in a `forward` of their own, where ZeRO-3 gathers weights."""

    def __init__(self, matrices: Iterable[Tensor]) -> None:
        super().__init__()
        for index, matrix in enumerate(matrices):
            self.register_parameter(str(index), nn.Parameter(matrix))


class Down(_Matrices):
    """The A matrices, fp32 `[rank, in]` each."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., in]` to `[..., parts * rank]`."""
        return F.linear(x, torch.cat([matrix.to(x.dtype) for matrix in self.parameters()]))


class Up(_Matrices):
    """The B matrices, fp32 `[out / parts, rank]` each."""

    def forward(self, h: Tensor) -> Tensor:
        """Maps `[..., parts * rank]` to `[..., out]`."""
        matrices = list(self.parameters())
        parts = h.chunk(len(matrices), dim=-1)
        outputs = [F.linear(part, matrix.to(h.dtype)) for part, matrix in zip(parts, matrices, strict=True)]
        return torch.cat(outputs, dim=-1)


class Lora(Adapter):
    """A low-rank update, initially zero: `B(reduce(A(dropout(x)) * scale))`.

    Args:
        layer: The layer.
        rank: Inner width.
        scale: Factor on the update.
        dropout: Probability that an input channel of the update is dropped in training.
    """

    def __init__(self, layer: LinearShape, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        rows = layer.out_features // layer.parts
        downs = (torch.empty(rank, layer.in_features, dtype=torch.float32) for _ in range(layer.parts))
        self.matrix_A = Down(downs)
        self.matrix_B = Up(torch.empty(rows, rank, dtype=torch.float32) for _ in range(layer.parts))
        self.lora_dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.layer, self.rank, self.scale = layer, rank, scale

    def delta(self, x: Tensor) -> Tensor:
        """Returns the update of the layer's output."""
        update: Tensor = self.matrix_B(self.layer.reduce(self.matrix_A(self.lora_dropout(x)) * self.scale))
        return update

    def merged(self, weight: Tensor) -> Tensor:
        """Returns the weight with the update, fp32, this rank's shard."""
        return weight.float() + torch.cat([part.up @ part.down for part in self.export()]) * self.scale

    def export(self) -> tuple[LowRank, ...]:
        """Returns the update of each part of the output, fp32, this rank's shard."""
        pairs = zip(self.matrix_A.parameters(), self.matrix_B.parameters(), strict=True)
        return tuple(LowRank(down.float(), up.float(), self.scale) for down, up in pairs)


def build(params: AdapterParams, layer: LinearShape) -> Lora:
    """Builds the adapter of a layer."""
    return Lora(layer, rank=params.r, scale=params.alpha / params.r, dropout=params.dropout)


def add_lora(
    dit: DiffusionTransformer,
    *,
    rank: int,
    alpha: float = 1.0,
    dropout: float = 0.0,
    targets: Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
) -> None:
    """Adds a low-rank update, initially zero, to each linear layer that matches.

    Args:
        dit: The transformer, changed in place.
        rank: Inner width of an update.
        alpha: Updates are scaled by alpha / rank. SAT's convention is 1.
        dropout: Probability that an input channel of an update is dropped in training.
        targets: Regular expressions searched in module names.
        seed: The run's seed.

    Raises:
        ConfigError: A pattern matches no linear layer.
    """

    def build_one(layer: LinearShape) -> Lora:
        return Lora(layer, rank=rank, scale=alpha / rank, dropout=dropout)

    add_adapters(dit, build_one, rank=rank, alpha=alpha, targets=targets, seed=seed)


def add_lora_for(dit: DiffusionTransformer, updates: Updates) -> None:
    """Adds adapters to exactly the layers of some updates, of their rank and scale, and loads them.

    Raises:
        CheckpointError: An update of a layer that the transformer does not have, or of another shape.
    """
    rank, scale = highest_rank(updates), common_scale(updates)
    if unknown := sorted(updates.keys() - linear_layers(dit).keys()):
        raise CheckpointError(
            f"the adapter has layers that this model does not have: {', '.join(unknown[:5])}",
            expected="an adapter for this model",
        )
    targets = [rf"^{re.escape(name)}$" for name in updates]
    add_lora(dit, rank=rank, alpha=scale * rank, targets=targets)
    load_updates(dit, updates)


def lora_layers(dit: nn.Module) -> Iterator[tuple[str, Lora]]:
    """Yields the low-rank adapters under the names of their layers."""
    layers = ((name, layer.adapter) for name, layer in adapted_layers(dit))
    return ((name, adapter) for name, adapter in layers if isinstance(adapter, Lora))


@torch.no_grad()
def load_updates(dit: nn.Module, updates: Updates) -> None:
    """Loads low-rank updates into the adapters of a transformer, all of them or none.

    The transformer keeps its own rank and scale: the ratio of the two scales is folded into the B matrix, and
    ranks beyond the update's own start at zero. So the effect is that of the file, whichever lora_alpha the
    transformer was built with.

    Args:
        dit: An adapted transformer, this rank's slice; adapters without an update stay unchanged.
        updates: Whole updates.

    Raises:
        CheckpointError: A layer that has no adapter here, another shape, or too high a rank; names them all.
    """
    adapters, size = dict(lora_layers(dit)), _model_size()
    shapes = {
        name: full_shape(f"{name}.weight", (each.layer.out_features, each.layer.in_features), size)
        for name, each in adapters.items()
    }
    faults = misfits(updates, shapes)
    for name in updates.keys() & adapters.keys():
        own, parts = adapters[name], updates[name]
        if own.layer.parts != len(parts):
            faults.append(f"{name} has updates of {len(parts)} parts, and {own.layer.parts} adapters here")
        ranks = {part.rank for part in parts if part is not None and part.rank > own.rank}
        faults += [
            f"{name} has an update of rank {rank}, and its adapter here has rank {own.rank}" for rank in ranks
        ]
    if faults:
        raise CheckpointError(
            "\n  - ".join([f"the adapter does not fit ({len(faults)} faults):", *sorted(faults)]),
            expected=f"updates of the layers that {PARAMS_KEY}.targets names, of rank .r at most",
            remedy=f"set {PARAMS_KEY}.targets and .r as the adapter was trained",
        )
    for name, parts in updates.items():
        for index, part in enumerate(parts):
            if part is not None:
                _load_update(name, index, adapters[name], part)


def _load_update(name: str, index: int, adapter: Lora, update: LowRank) -> None:
    for side, matrix in (("matrix_A", update.down.float()), ("matrix_B", update.scaled_up(adapter.scale))):
        target = getattr(adapter, side).get_parameter(str(index))
        key = f"{name}.{side}.{index}"
        shard = shard_weight(key, matrix, rank=mpu.get_model_parallel_rank(), size=_model_size())
        if side == "matrix_A":
            target[: update.rank].copy_(shard)
        else:
            target.zero_()[:, : update.rank].copy_(shard)


def _model_size() -> int:
    return int(mpu.get_model_parallel_world_size())

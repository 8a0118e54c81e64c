"""Low-rank adapters (LoRA) on SAT's linear layers, right under tensor parallelism.

An adapted layer keeps its own weight under its own key and gains `matrix_A.i` and `matrix_B.i`: one pair for
each of the equal parts of its output, three for the fused q, k, v. These are the names, shapes and scale
(alpha / rank) of SAT's `lora2`, so its checkpoints load.

Source: THUDM/SwissArmyTransformer@63dc23a `sat/model/finetune/lora2.py`; there the update of a row-parallel
    layer is not summed over the ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from sat import mpu
from sat.model.base_model import BaseMixin
from sat.mpu import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from sat_train.errors import CheckpointError, ConfigError, Fault
from sat_train.models.dit.initialization import initialize_parameter
from sat_train.models.dit.sharding import full_shape, shard_weight
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.low_rank import LowRank, Updates, common_scale, highest_rank, misfits

DEFAULT_TARGETS = (r"attention\.query_key_value$", r"attention\.dense$")

_PARAMS_KEY = "model.network_config.params.modules.lora_config.params"


# The layers people adapt, and what diffusers and PEFT call them.
_SUGGESTED = (
    r"attention\.query_key_value (to_q, to_k, to_v elsewhere), attention\.dense (to_out.0), mlp\. (ff.net), "
    r"adaLN_modulations\. (norm1.linear, norm2.linear)"
)


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


class _LowRank(nn.Module):
    """What the adapted layers share: `y + B(between(A(dropout(x)) * scale))`."""

    weight: Tensor  # of the layer
    matrix_A: Down
    matrix_B: Up
    lora_dropout: nn.Module
    lora_scale: float
    lora_merged: bool

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer and its update."""
        y: Tensor = super().forward(x)
        if self.lora_merged:
            assert not self.training, "unmerge the adapters before training"
        else:
            y = y + self.matrix_B(self._between(self.matrix_A(self.lora_dropout(x)) * self.lora_scale))
        return y

    @staticmethod
    def _between(h: Tensor) -> Tensor:
        return h

    def low_rank_weight(self) -> Tensor:
        """Returns what merging adds to the weight, fp32, this rank's slice."""
        pairs = zip(self.matrix_A.parameters(), self.matrix_B.parameters(), strict=True)
        return torch.cat([up.float() @ down.float() for down, up in pairs]) * self.lora_scale


class LoraLinear(_LowRank, nn.Linear):
    """An adapted plain layer."""


class LoraColumnParallelLinear(_LowRank, ColumnParallelLinear):
    """An adapted layer whose output is sharded: A whole on every rank, B sharded; A's gradient is summed."""

    @staticmethod
    def _between(h: Tensor) -> Tensor:
        copied: Tensor = copy_to_model_parallel_region(h)
        return copied


class LoraRowParallelLinear(_LowRank, RowParallelLinear):
    """An adapted layer whose input is sharded: A sharded, B whole on every rank; partial sums are added."""

    @staticmethod
    def _between(h: Tensor) -> Tensor:
        reduced: Tensor = reduce_from_model_parallel_region(h)
        return reduced


_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LoraLinear,
    ColumnParallelLinear: LoraColumnParallelLinear,
    RowParallelLinear: LoraRowParallelLinear,
}


class LoraMixin(BaseMixin):
    """Marks a transformer as adapted, and keeps rank and alpha with its weights."""

    def __init__(self, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.register_buffer("rank", torch.tensor(rank))
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float32))


def add_lora(
    dit: DiffusionTransformer,
    *,
    rank: int,
    alpha: float = 1.0,
    dropout: float = 0.0,
    targets: Sequence[str] = DEFAULT_TARGETS,
    seed: int = 0,
) -> None:
    """Gives the linear layers that match an update of low rank, which starts at zero.

    Args:
        dit: The transformer, changed in place.
        rank: Inner width of an update.
        alpha: Updates are scaled by alpha / rank. SAT's convention is 1.
        dropout: Probability that an input channel of an update is dropped in training.
        targets: Regular expressions searched in module names such as
            `transformer.layers.0.attention.query_key_value`.
        seed: The run's seed.

    Raises:
        ConfigError: A pattern matches no linear layer.
    """
    layers = {name: module for name, module in dit.named_modules() if type(module) in _ADAPTED}
    _check_targets(targets, layers)
    for name, module in layers.items():
        if any(re.search(target, name) for target in targets):
            _adapt(name, module, rank=rank, scale=alpha / rank, dropout=dropout, seed=seed)
    with torch.device(dit.device):
        dit.add_mixin("lora", LoraMixin(rank=rank, alpha=alpha))


def add_lora_for(dit: DiffusionTransformer, updates: Updates) -> None:
    """Gives exactly the layers of some updates adapters, of their rank and scale, and loads them.

    Raises:
        CheckpointError: An update of a layer that the transformer does not have, or of another shape.
    """
    rank, scale = highest_rank(updates), common_scale(updates)
    names = {name for name, module in dit.named_modules() if type(module) in _ADAPTED}
    if unknown := sorted(updates.keys() - names):
        raise CheckpointError(
            f"the adapter is of layers that this model does not have: {', '.join(unknown[:5])}",
            expected="an adapter of this model",
        )
    targets = [rf"^{re.escape(name)}$" for name in updates]
    add_lora(dit, rank=rank, alpha=scale * rank, targets=targets)
    load_updates(dit, updates)


def _check_targets(targets: Sequence[str], layers: Mapping[str, nn.Module]) -> None:
    faults = [
        Fault(
            path=f"{_PARAMS_KEY}.targets",
            value=target,
            expected=f"a pattern that some linear layer matches, such as {_SUGGESTED}",
        )
        for target in targets
        if not any(re.search(target, name) for name in layers)
    ]
    if faults:
        raise ConfigError(faults)


def _adapt(name: str, layer: nn.Module, *, rank: int, scale: float, dropout: float, seed: int) -> None:
    plain = type(layer)
    parts = layer.stride if isinstance(layer, ColumnParallelLinear) else 1
    # the layer stays the object it is, so its weight, its key and whoever holds it stay too
    layer.__class__ = _ADAPTED[plain]
    assert isinstance(layer, _LowRank)
    out_features, in_features = layer.weight.shape
    with layer.weight.device:
        layer.matrix_A = Down(torch.empty(rank, in_features, dtype=torch.float32) for _ in range(parts))
        layer.matrix_B = Up(
            torch.empty(out_features // parts, rank, dtype=torch.float32) for _ in range(parts)
        )
    layer.lora_dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
    layer.lora_scale, layer.lora_merged = scale, False
    # SAT's mark of a slice, by which DeepSpeed counts it once on each rank in the gradient's norm
    sharded = {ColumnParallelLinear: layer.matrix_B, RowParallelLinear: layer.matrix_A}.get(plain)
    for matrix in sharded.parameters() if sharded else ():
        matrix.model_parallel = True  # type: ignore[attr-defined]  # an attribute that SAT adds
    full_in = getattr(layer, "input_size", in_features)
    if layer.weight.device.type != "meta":
        for suffix, matrix in layer.named_parameters():
            if suffix.startswith("matrix_"):
                initialize_parameter(f"{name}.{suffix}", matrix, seed=seed, fan_in=full_in)


def lora_layers(dit: nn.Module) -> Iterator[tuple[str, _LowRank]]:
    """Yields the adapted layers and their names."""
    return ((name, module) for name, module in dit.named_modules() if isinstance(module, _LowRank))


@torch.no_grad()
def merge_lora(dit: nn.Module) -> None:
    """Adds the updates to the weights in place, for sampling at the base model's speed."""
    for _, layer in lora_layers(dit):
        if not layer.lora_merged:
            layer.weight.copy_(layer.weight.float() + layer.low_rank_weight())
            layer.lora_merged = True


@torch.no_grad()
def unmerge_lora(dit: nn.Module) -> None:
    """Takes merged updates out again, to rounding in the dtype of the weights."""
    for _, layer in lora_layers(dit):
        if layer.lora_merged:
            layer.weight.copy_(layer.weight.float() - layer.low_rank_weight())
            layer.lora_merged = False


def adapter_state_dict(dit: nn.Module) -> dict[str, Tensor]:
    """Returns the updates alone, with rank and alpha: `...matrix_A.i`, `...matrix_B.i`, `mixins.lora.*`."""
    return {
        key: value
        for key, value in dit.state_dict().items()
        if re.search(r"\.matrix_[AB]\.\d+$", key) or key.startswith("mixins.lora.")
    }


@torch.no_grad()
def load_updates(dit: nn.Module, updates: Updates) -> None:
    """Loads low-rank updates into the adapters of a transformer, all of them or none.

    The transformer keeps its own rank and scale: what an update was scaled by is folded into its B matrix,
    and ranks beyond the update's own start at zero. So the transformer computes what the file says, whichever
    lora_alpha it was built with.

    Args:
        dit: An adapted transformer, this rank's slice; the adapters that get no update stay as they are.
        updates: Whole updates.

    Raises:
        CheckpointError: A layer that has no adapter here, another shape, or too high a rank; names them all.
    """
    layers = dict(lora_layers(dit))
    shapes = {
        name: full_shape(f"{name}.weight", layer.weight.shape, _model_size())
        for name, layer in layers.items()
    }
    faults = misfits(updates, shapes)
    for name in updates.keys() & layers.keys():
        own = [tuple(matrix.shape) for matrix in layers[name].matrix_A.parameters()]
        if len(own) != len(updates[name]):
            faults.append(f"{name} has updates of {len(updates[name])} parts, and {len(own)} adapters here")
        ranks = {part.rank for part in updates[name] if part is not None and part.rank > own[0][0]}
        faults += [
            f"{name} has an update of rank {rank}, and its adapter here has rank {own[0][0]}"
            for rank in ranks
        ]
    if faults:
        raise CheckpointError(
            "\n  - ".join([f"the adapter does not fit ({len(faults)} faults):", *sorted(faults)]),
            expected=f"updates of the layers that {_PARAMS_KEY}.targets names, of rank .r at most",
            remedy=f"set {_PARAMS_KEY}.targets and .r as the adapter was trained",
        )
    for name, parts in updates.items():
        for index, part in enumerate(parts):
            if part is not None:
                _load_update(name, index, layers[name], part)


def _load_update(name: str, index: int, layer: _LowRank, update: LowRank) -> None:
    for side, matrix in (("matrix_A", update.down.float()), ("matrix_B", update.scaled_up(layer.lora_scale))):
        target = getattr(layer, side).get_parameter(str(index))
        key = f"{name}.{side}.{index}"
        given = shard_weight(key, matrix, rank=mpu.get_model_parallel_rank(), size=_model_size())
        if side == "matrix_A":
            target[: update.rank].copy_(given)
        else:
            target.zero_()[:, : update.rank].copy_(given)


def _model_size() -> int:
    return int(mpu.get_model_parallel_world_size())

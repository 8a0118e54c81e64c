"""Adapters: modules that train next to frozen linear layers, right under tensor parallelism."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from sat.model.base_model import BaseMixin
from sat.mpu import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from sat_train.config.parts.adapter_parts import LAYER_ALPHA, MIXIN, find_adapter_tensor
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import ConfigError, Fault
from sat_train.models.dit.initialization import initialize_parameter
from sat_train.models.dit.sat_layers import LINEAR
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.frozen_layers import make_plain
from sat_train.models.low_rank import Parts

PARAMS_KEY = "model.network_config.params.modules.lora_config.params"
# The layers people adapt, and what diffusers and PEFT call them.
_SUGGESTED = (
    r"attention\.query_key_value (to_q, to_k, to_v elsewhere), attention\.dense (to_out.0), mlp\. (ff.net), "
    r"adaLN_modulations\. (norm1.linear, norm2.linear)"
)


@dataclass(frozen=True)
class LinearShape:
    """A linear layer as this rank holds it.

    Args:
        name: The layer, such as `transformer.layers.0.attention.dense`.
        in_features: Inputs.
        out_features: Outputs.
        parts: Equal parts of the output that are adapted apart: three for the fused q, k, v.
        sharded: The side that is divided over the ranks of the model axis.
    """

    name: str
    in_features: int
    out_features: int
    parts: int
    sharded: Literal["in", "out", ""]

    def reduce(self, inner: Tensor) -> Tensor:
        """Brings an inner activation from the input's ranks to the output's, forward and backward.

        Where the input is sharded, `inner` holds partial sums, which are added; where the output is, every
        rank has a part of the gradient of `inner`, and these are added.
        """
        if not self.sharded:
            return inner
        region = reduce_from_model_parallel_region if self.sharded == "in" else copy_to_model_parallel_region
        moved: Tensor = region(inner)
        return moved


class Adapter(nn.Module):
    """An adapter of one linear layer. Its submodules lie under the layer's own name in the weights.

    Parameters belong into submodules that compute with them in a `forward`, where ZeRO-3 gathers them; their
    names are those of the record's `tensors`.

    Args:
        layer: The layer.
        rank: Inner width.
        scale: Factor on the update; saved as alpha, which is scale * rank.
    """

    is_merged = False
    is_off = False

    def __init__(self, layer: LinearShape, *, rank: int, scale: float) -> None:
        super().__init__()
        self.layer, self.rank, self.scale = layer, rank, scale

    def delta(self, x: Tensor) -> Tensor:
        """Returns what is added to the layer's output."""
        raise NotImplementedError

    def adapted(self, y: Tensor, x: Tensor, base: AdaptedLayer) -> Tensor:
        """Returns the output with the adapter, given the layer's own, `y`; most adapters add `delta(x)`."""
        return y + self.delta(x)

    def merged(self, weight: Tensor) -> Tensor:
        """Returns the weight that alone computes what layer and adapter compute, fp32; this rank's shard."""
        raise NotImplementedError

    def start(self, weight: Tensor, mesh: ProcessMesh, *, seed: int) -> None:
        """Sets what follows from the layer's weight, in place, when a run starts; a resumed run loads it.

        Args:
            weight: This rank's shard.
            mesh: The process mesh.
            seed: The run's seed.

        Ranks: all.
        """

    def misfits(self, parts: Parts) -> list[str]:
        """Returns why updates cannot be loaded, beginning with the layer's name."""
        return [f"{self.layer.name} has a {type(self).__name__} adapter, which cannot start from a LoRA file"]

    def load(self, parts: Parts, weight: Tensor) -> None:
        """Loads updates that fit, whole ones, in place.

        Args:
            parts: The update of each part of the output; a part without one stays as it is.
            weight: This rank's shard of the layer's weight.
        """
        raise NotImplementedError


class AdaptedLayer(nn.Module):
    """A linear layer that holds an adapter."""

    weight: Tensor
    bias: Tensor | None
    adapter: Adapter

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer and its adapter."""
        y: Tensor = super().forward(x)
        if self.adapter.is_off:
            return y
        if not self.adapter.is_merged:
            return self.adapter.adapted(y, x, self)
        assert not self.training, "adapters that are merged into the weights do not train"
        return y


_ADAPTED = {plain: type(f"Adapted{plain.__name__}", (AdaptedLayer, plain), {}) for plain in LINEAR}


class AdapterMixin(BaseMixin):
    """Marks a transformer as adapted, and keeps rank and alpha with its weights."""

    def __init__(self, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.register_buffer("rank", torch.tensor(rank))
        self.register_buffer("alpha", torch.tensor(alpha, dtype=torch.float32))


def add_adapters(
    dit: DiffusionTransformer,
    build: Callable[[LinearShape], Adapter],
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int,
) -> None:
    """Adds an adapter to each linear layer that matches.

    Args:
        dit: The transformer, changed in place.
        build: Makes the adapter of a layer.
        rank: Inner width of most adapters, kept with the weights.
        alpha: Their scale is alpha / rank; kept with the weights, and where an adapter has another one, that
            too.
        targets: Regular expressions searched in module names such as
            `transformer.layers.0.attention.query_key_value`.
        seed: The run's seed.

    Raises:
        ConfigError: A pattern matches no linear layer.
    """
    layers = linear_layers(dit)
    _check_targets(targets, layers)
    for name, layer in layers.items():
        if any(re.search(target, name) for target in targets):
            _adapt(name, layer, build, alpha=alpha, seed=seed)
    with torch.device(dit.device):
        dit.add_mixin(MIXIN, AdapterMixin(rank=rank, alpha=alpha))


def linear_layers(dit: DiffusionTransformer) -> dict[str, nn.Module]:
    """Returns the linear layers that can be adapted, by name: those of the base, not of added modules."""
    added = tuple(dit.modules_of_its_own())
    return {
        name: module
        for name, module in dit.named_modules()
        if type(module) in _ADAPTED and not name.startswith(added)
    }


def _check_targets(targets: Sequence[str], layers: Mapping[str, nn.Module]) -> None:
    faults = [
        Fault(
            path=f"{PARAMS_KEY}.targets",
            value=target,
            expected=f"a pattern that some linear layer matches, such as {_SUGGESTED}",
        )
        for target in targets
        if not any(re.search(target, name) for name in layers)
    ]
    if faults:
        raise ConfigError(faults)


def _adapt(
    name: str, layer: nn.Module, build: Callable[[LinearShape], Adapter], *, alpha: float, seed: int
) -> None:
    shape = _shape_of(name, layer)
    assert isinstance(layer.weight, Tensor), "a linear layer"
    with layer.weight.device:
        adapter = build(shape)
    # the layer stays the object it is, so its weight, its key and whoever holds it stay too
    layer.__class__ = _ADAPTED[type(layer)]
    for child, module in adapter.named_children():
        layer.add_module(child, module)
    own_alpha = adapter.scale * adapter.rank
    if not math.isclose(own_alpha, alpha, rel_tol=1e-6):
        value = torch.tensor(own_alpha, dtype=torch.float32, device=layer.weight.device)
        layer.register_buffer(LAYER_ALPHA, value)
    object.__setattr__(layer, "adapter", adapter)  # no module of its own: it would be a part of all keys
    fan_in = getattr(layer, "input_size", shape.in_features)
    for suffix, parameter in adapter.named_parameters():
        match = find_adapter_tensor(f"{name}.{suffix}")
        assert match is not None, f"the adapter's parameter {suffix} is not among the `tensors` of its record"
        if shape.sharded and match[1].shard == shape.sharded:
            # SAT's mark of a shard, by which DeepSpeed counts it once on each rank in the gradient's norm
            parameter.model_parallel = True  # type: ignore[attr-defined]  # an attribute that SAT adds
        if parameter.device.type != "meta":
            initialize_parameter(f"{name}.{suffix}", parameter, seed=seed, fan_in=fan_in)


def _shape_of(name: str, layer: nn.Module) -> LinearShape:
    out_features, in_features = cast(Tensor, layer.weight).shape
    if isinstance(layer, ColumnParallelLinear):
        return LinearShape(name, in_features, out_features, layer.stride, "out")
    sharded: Literal["in", ""] = "in" if isinstance(layer, RowParallelLinear) else ""
    return LinearShape(name, in_features, out_features, 1, sharded)


def adapted_layers(dit: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """Yields the adapted layers and their names."""
    return ((name, module) for name, module in dit.named_modules() if isinstance(module, AdaptedLayer))


@torch.no_grad()
def start_adapters(dit: nn.Module, mesh: ProcessMesh, *, seed: int) -> None:
    """Sets what adapters take from the weights of their layers; call it when these have been loaded.

    Ranks: all.
    """
    for _, layer in adapted_layers(dit):
        layer.adapter.start(layer.weight.to(mesh.device), mesh, seed=seed)


@torch.no_grad()
def merge_adapters(dit: nn.Module) -> None:
    """Puts the adapters into the weights in place, for sampling at the base model's speed."""
    for _, layer in adapted_layers(dit):
        if not layer.adapter.is_merged:
            make_plain(layer)
            layer.weight.copy_(layer.adapter.merged(layer.weight))
            layer.adapter.is_merged = True


@contextmanager
def adapters_off(dit: nn.Module) -> Iterator[None]:
    """Switches the adapters off inside its body: the model computes what its own weights do, at no memory.

    A backward belongs outside: what it computes again would lack the adapters.
    """
    adapters = [layer.adapter for _, layer in adapted_layers(dit)]
    for adapter in adapters:
        adapter.is_off = True
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_off = False


def adapter_state_dict(dit: nn.Module) -> dict[str, Tensor]:
    """Returns the adapters alone, with rank and alpha: `...matrix_A.i`, `...matrix_B.i`, `mixins.lora.*`."""
    return {
        key: value
        for key, value in dit.state_dict().items()
        if find_adapter_tensor(key) or key.startswith(f"mixins.{MIXIN}.")
    }

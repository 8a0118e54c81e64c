"""Slot `adapter` (`lora_config` of the network's modules), and the names of adapters in weights.

A builder gets the parameters and a `LinearShape`, and returns an `Adapter` (`sat_train/models/adapter.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple, TypeVar

from pydantic import Field

from sat_train.config.parts.record import PatternAlphas, PatternRanks, Texts
from sat_train.config.parts.registry import Choice, Params, part, parts_of, registry_revision

# Keys next to the adapters, in SAT's spelling; LAYER_ALPHA stands under a layer whose alpha is another one
MIXIN = "lora"
RANK_KEY, ALPHA_KEY = f"mixins.{MIXIN}.rank", f"mixins.{MIXIN}.alpha"
LAYER_ALPHA = "lora_alpha"

N = TypeVar("N", int, float)


class AdapterTensor(NamedTuple):
    """Initial values and sharding of an adapter's tensors of one name.

    Args:
        shard: The side of the layer on which it is sharded under tensor parallelism where the layer is: `in`
            is dim 1, `out` is dim 0; empty: every rank holds it whole.
        init: Initial values: `linear` as a linear layer's, `zeros` or `ones`.
    """

    shard: Literal["in", "out", ""]
    init: Literal["linear", "zeros", "ones"]


class AdapterParams(Params):
    """Settings that every adapter has: rank, scale, layers and dropout.

    `tensors` holds the names of what it saves: `NAME` or `NAME.i` under the layer. `read` names the function
    (`module:function`) that returns the updates of a layer, given its saved tensors, whole, and its scale:
    sampling and export use it. Empty: neither is possible.
    """

    tensors: ClassVar[dict[str, AdapterTensor]] = {}
    read: ClassVar[str] = ""

    r: int = Field(ge=1, description="Rank.")
    lora_alpha: float = Field(
        1.0,
        gt=0,
        description="The adapter's scale is lora_alpha / r. SAT's convention is 1, with lr 1e-3.",
    )
    use_rslora: bool = Field(
        False, description="Rank-stabilised (arXiv:2312.03732): the scale is lora_alpha / sqrt(r)."
    )
    targets: Texts = Field(
        (r"attention\.query_key_value$", r"attention\.dense$"),
        min_length=1,
        description="Regular expressions searched in the module names; each must find one.",
    )
    rank_pattern: PatternRanks = Field(
        (),
        description="Ranks of single layers: `{mlp: 8}`, or pairs `[['mlp|dense$', 8]]` of a regular "
        "expression, searched like `targets`, and a rank. The first that matches wins.",
    )
    alpha_pattern: PatternAlphas = Field((), description="The same for lora_alpha.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapter.")

    @property
    def lr_factors(self) -> dict[str, float]:
        """Factors on the learning rate of its tensors, by names out of `tensors`; 1 where there is none."""
        return {}

    def scale(self, rank: int, alpha: float) -> float:
        """Returns the factor on an adapter."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank_of(self, layer: str) -> int:
        """Returns the rank of a layer's adapter."""
        return _first_match(self.rank_pattern, layer, self.r)

    def scale_of(self, layer: str) -> float:
        """Returns the factor on a layer's adapter."""
        alpha = _first_match(self.alpha_pattern, layer, self.lora_alpha)
        return self.scale(self.rank_of(layer), alpha)

    def scales(self, layers: Iterable[str]) -> list[float]:
        """Returns the different scales of the adapters among some layers, the smallest first."""
        return sorted({self.scale_of(layer) for layer in self.targeted(layers)})

    def targeted(self, layers: Iterable[str]) -> tuple[str, ...]:
        """Returns the layers that get an adapter."""
        return tuple(layer for layer in layers if any(re.search(target, layer) for target in self.targets))


def _first_match(patterns: Iterable[tuple[str, N]], layer: str, default: N) -> N:
    return next((number for pattern, number in patterns if re.search(pattern, layer)), default)


class AdapterConfig(Choice):
    """Adapters of linear layers."""

    slot: ClassVar[str] = "adapter"

    target: str = Field("Lora", description="Kind of adapter.")
    params: AdapterParams = Field(description="Its settings.")


@part("adapter", "Lora", build="sat_train.models.lora:build")
class LoraParams(AdapterParams):
    """Low-rank adapters on frozen weights."""

    tensors: ClassVar[dict[str, AdapterTensor]] = {
        "matrix_A": AdapterTensor("in", "linear"),
        "matrix_B": AdapterTensor("out", "zeros"),
    }
    read: ClassVar[str] = "sat_train.models.lora:read"

    loraplus_lr_ratio: float = Field(
        1.0, gt=0, description="LoRA+ (arXiv:2402.12354): learning rate of B over that of A; 16 there."
    )

    @property
    def lr_factors(self) -> dict[str, float]:
        """The factor of LoRA+."""
        return {"matrix_B": self.loraplus_lr_ratio}


@part("adapter", "Dora", build="sat_train.models.dora:build")
class DoraParams(LoraParams):
    """LoRA of the direction of each row of the weight, and its length apart (DoRA, arXiv:2402.09353)."""

    tensors: ClassVar[dict[str, AdapterTensor]] = {
        **LoraParams.tensors,
        "magnitude": AdapterTensor("out", "zeros"),
    }
    read: ClassVar[str] = "sat_train.models.dora:read"


@part("adapter", "Pissa", build="sat_train.models.pissa:build")
class PissaParams(AdapterParams):
    """LoRA that starts at the principal singular vectors of the weight (PiSSA, arXiv:2404.02948)."""

    tensors: ClassVar[dict[str, AdapterTensor]] = {
        "shift_A": AdapterTensor("in", "zeros"),
        "shift_B": AdapterTensor("out", "zeros"),
        "principal_A": AdapterTensor("in", "zeros"),
        "principal_B": AdapterTensor("out", "zeros"),
    }
    read: ClassVar[str] = "sat_train.models.pissa:read"


def find_adapter_tensor(key: str) -> tuple[str, AdapterTensor] | None:
    """Returns the adapted layer and the tensor's record; None for a key that belongs to no adapter.

    Args:
        key: SAT key, with or without a prefix.
    """
    match = _pattern_at(registry_revision()).fullmatch(key)
    return (match[1], _tensors_at(registry_revision())[match[2]]) if match else None


def find_adapter(names: set[str]) -> type[AdapterParams] | None:
    """Returns the record of the adapter that saves tensors of these names: the one with the fewest more."""
    records = [record for record in _records() if names <= record.tensors.keys()]
    return min(records, key=lambda record: (len(record.tensors), not record.read), default=None)


def _records() -> list[type[AdapterParams]]:
    records = (each.params for each in parts_of(AdapterConfig.slot).values())
    return [record for record in records if issubclass(record, AdapterParams)]


@lru_cache(maxsize=1)
def _tensors_at(revision: int) -> dict[str, AdapterTensor]:
    own = {name: tensor for record in _records() for name, tensor in record.tensors.items()}
    return {LAYER_ALPHA: AdapterTensor("", "ones"), **own}


@lru_cache(maxsize=1)
def _pattern_at(revision: int) -> re.Pattern[str]:
    return re.compile(rf"(.+)\.({'|'.join(map(re.escape, _tensors_at(revision)))})(?:\.\d+)?")

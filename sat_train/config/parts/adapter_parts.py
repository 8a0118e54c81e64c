"""Slot `adapter` (`lora_config` of the network's modules), and the names of adapters in weights.

A builder gets the parameters and a `LinearShape`, and returns an `Adapter` (`sat_train/models/adapter.py`).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from sat_train.config.parts.record import Texts
from sat_train.config.parts.registry import Choice, Params, part, parts_of, registry_revision

# Keys next to the adapters, in SAT's spelling, and the matrices of a plain LoRA
MIXIN = "lora"
RANK_KEY, ALPHA_KEY = f"mixins.{MIXIN}.rank", f"mixins.{MIXIN}.alpha"
LORA_MATRIX = re.compile(r"(.+)\.matrix_([AB])\.(\d+)")


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
    """Settings that every adapter has: rank, strength, layers and dropout.

    `tensors` holds the names of its parameters: `NAME` or `NAME.i` under the layer.
    """

    tensors: ClassVar[dict[str, AdapterTensor]] = {}

    r: int = Field(ge=1, description="Rank.")
    lora_alpha: float = Field(
        1.0,
        gt=0,
        description="The adapter's scale is lora_alpha / r. SAT's convention is 1, with lr 1e-3.",
    )
    targets: Texts = Field(
        (r"attention\.query_key_value$", r"attention\.dense$"),
        min_length=1,
        description="Regular expressions searched in the module names; each must find one.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of the adapter.")

    @property
    def alpha(self) -> float:
        """Alpha of the equivalent plain LoRA, whose scale is alpha / r. Saved with the weights."""
        return self.lora_alpha


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


def find_adapter_tensor(key: str) -> tuple[str, AdapterTensor] | None:
    """Returns the adapted layer and the tensor's record; None for a key that belongs to no adapter.

    Args:
        key: SAT key, with or without a prefix.
    """
    match = _pattern_at(registry_revision()).fullmatch(key)
    return (match[1], _tensors_at(registry_revision())[match[2]]) if match else None


@lru_cache(maxsize=1)
def _tensors_at(revision: int) -> dict[str, AdapterTensor]:
    records = [each.params for each in parts_of(AdapterConfig.slot).values()]
    return {name: tensor for params in records for name, tensor in getattr(params, "tensors", {}).items()}


@lru_cache(maxsize=1)
def _pattern_at(revision: int) -> re.Pattern[str]:
    return re.compile(rf"(.+)\.({'|'.join(map(re.escape, _tensors_at(revision)))})(?:\.\d+)?")

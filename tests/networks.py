"""Small transformers by their numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from sat_train.config import NetworkSpec
from sat_train.config.parts.adapter_parts import AdapterConfig
from sat_train.config.parts.position_parts import PositionConfig
from sat_train.models.build import add_adapters_of
from sat_train.models.dit import recompute
from sat_train.models.dit.transformer import DiffusionTransformer

SMALL: dict[str, Any] = {
    "layers": 2,
    "width": 64,
    "heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "patch": (1, 2, 2),
    "text_width": 12,
    "time_width": 16,
    "positions": "rotary",
    "latent_size": (3, 4, 6),
    "text_length": 5,
}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sincos": ("Sincos3DPositionEmbedding", {}),
    "rotary": ("Rotary3DPositionEmbedding", {}),
    "rotary_learned": ("Rotary3DPositionEmbedding", {"learnable_pos_embed": True}),
}


def network_spec(**numbers: Any) -> NetworkSpec:
    """Returns a spec; `positions` is their kind, and their own numbers stand beside those of the network."""
    target, params = _KINDS[numbers.pop("positions")]
    own = {name: numbers.pop(name) for name in ("text_length", "size_policy") if name in numbers}
    trained_latent = numbers.pop("latent_size")
    return NetworkSpec(
        **{"temporal_compression": 4, "spatial_compression": 8, **numbers},
        trained_latent=trained_latent,
        positions=PositionConfig.of(target, {**params, **own}),
    )


def build_network(**options: Any) -> DiffusionTransformer:
    """Builds a small transformer; options replace its numbers, or are those of `DiffusionTransformer`."""
    others = ("hook_order", "recompute", "inputs_on_host", "device", "dtype", "init_seed")
    building = {name: options.pop(name) for name in others if name in options}
    return DiffusionTransformer(network_spec(**{**SMALL, **options}), **building)


def add_adapters(dit: DiffusionTransformer, kind: str = "Lora", *, seed: int = 0, **settings: Any) -> None:
    """Adds adapters by their settings, which the tests call rank and alpha; alpha is 1 by default."""
    renamed = {"rank": "r", "alpha": "lora_alpha"}
    params = {renamed.get(name, name): value for name, value in settings.items()}
    add_adapters_of(dit, AdapterConfig.of(kind, params), seed=seed)


def norms_as_on_a_gpu() -> AbstractContextManager[object]:
    """Returns a context in which the backward on a CPU computes norms again, as it does on a GPU."""
    return patch.object(recompute, "_COMPUTES_NORMS_AGAIN", ("cpu",))

"""Adapters from files in a transformer: loaded into its own, or added as the file has them."""

from __future__ import annotations

import re

import torch
from sat import mpu
from torch import nn

from sat_train.errors import CheckpointError
from sat_train.models.adapter import PARAMS_KEY, LinearShape, adapted_layers, add_adapters, linear_layers
from sat_train.models.dit.sharding import full_shape
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.dora import Dora
from sat_train.models.lora import Lora
from sat_train.models.low_rank import Updates, common_scale, highest_rank, is_dora, misfits


def add_adapters_for(dit: DiffusionTransformer, updates: Updates) -> None:
    """Adds adapters to exactly the layers of some updates, each of its rank and scale, and loads them.

    Raises:
        CheckpointError: An update of a layer that the transformer does not have, or of another shape.
    """
    if unknown := sorted(updates.keys() - linear_layers(dit).keys()):
        raise CheckpointError(
            f"the adapter has layers that this model does not have: {', '.join(unknown[:5])}",
            expected="an adapter for this model",
        )

    def build(layer: LinearShape) -> Lora:
        own = {layer.name: updates[layer.name]}
        kind = Dora if is_dora(own) else Lora
        return kind(layer, rank=highest_rank(own), scale=common_scale(own))

    rank, targets = highest_rank(updates), [rf"^{re.escape(name)}$" for name in updates]
    add_adapters(dit, build, rank=rank, alpha=common_scale(updates) * rank, targets=targets, seed=0)
    load_updates(dit, updates)


@torch.no_grad()
def load_updates(dit: nn.Module, updates: Updates) -> None:
    """Loads low-rank updates into the adapters of a transformer, all of them or none.

    The transformer keeps its own ranks and scales, and the effect is that of the file, whichever lora_alpha
    the transformer was built with.

    Args:
        dit: An adapted transformer, this rank's slice; adapters without an update stay unchanged.
        updates: Whole updates.

    Raises:
        CheckpointError: A layer that has no adapter here, another shape, too high a rank, or an adapter that
            cannot start from these updates; names them all.
    """
    layers, size = dict(adapted_layers(dit)), int(mpu.get_model_parallel_world_size())
    shapes = {name: full_shape(f"{name}.weight", each.weight.shape, size) for name, each in layers.items()}
    known = updates.keys() & layers.keys()
    faults = misfits(updates, shapes)
    faults += [fault for name in known for fault in layers[name].adapter.misfits(updates[name])]
    if faults:
        raise CheckpointError(
            "\n  - ".join([f"the adapter does not fit ({len(faults)} faults):", *sorted(faults)]),
            expected=f"updates of the layers that {PARAMS_KEY}.targets names, of rank .r at most",
            remedy=f"set {PARAMS_KEY}.targets and .r as the adapter was trained",
        )
    for name, parts in updates.items():
        layers[name].adapter.load(parts, layers[name].weight)

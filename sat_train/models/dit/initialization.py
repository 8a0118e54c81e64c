"""Initial weights: a pure function of the seed and the weight's name, whatever the device or mesh."""

from __future__ import annotations

import math
import re
from typing import TypeVar

import torch
from sat import mpu
from torch import Tensor, nn

from sat_train.config.parts.adapter_parts import find_adapter_tensor
from sat_train.distributed.seeds import derive_generator
from sat_train.models.dit.sharding import full_shape, shard_weight

_STD = 0.02

M = TypeVar("M", bound=nn.Module)

# The first pattern found in a weight's name decides; a weight that none matches is a plain linear layer.
_RULES = (
    (r"norm.*\.weight$", "ones"),
    (r"norm.*\.bias$", "zeros"),
    (r"adaLN_modulations\.", "zeros"),
    (r"pos_embedding$", "zeros"),
    (r"transformer\.layers\..*\.bias$|(patch_embed\.proj|final_layer\.linear)\.bias$", "zeros"),
    (r"(query_key_value|dense_h_to_4h)\.weight$", "normal"),
    (r"(attention\.dense|dense_4h_to_h)\.weight$", "scaled_normal"),
    (r"(patch_embed\.proj|final_layer\.linear)\.weight$", "xavier"),
)


def initialize_weights(model: nn.Module, *, seed: int, num_layers: int) -> None:
    """Fills every parameter in place. Gates start at zero, so every block of a new model is the identity.

    Args:
        model: A transformer with SAT's keys, on a real device; this rank's slice of it.
        seed: The run's seed.
        num_layers: Blocks; weights that write into the residual stream are scaled by it.

    Source: THUDM/SwissArmyTransformer@63dc23a `sat/mpu/utils.py`; zai-org/CogVideo@7a1af71
        `sat/dit_video_concat.py` `reinit` of each mixin.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        weight = name.removesuffix("bias") + "weight" if name.endswith(".bias") else name
        fan_in = math.prod(full_shape(weight, parameters[weight].shape, _model_size())[1:])
        initialize_parameter(name, parameter, seed=seed, fan_in=fan_in, num_layers=num_layers)


@torch.no_grad()
def initialize_parameter(
    name: str, parameter: Tensor, *, seed: int, fan_in: int, num_layers: int = 1
) -> None:
    """Fills one parameter in place with this rank's slice of its initial value.

    Args:
        name: SAT key: determines the distribution, and is mixed into the seed.
        parameter: This rank's slice.
        seed: The run's seed.
        fan_in: Inputs of the layer; sets the range of plain linear layers.
        num_layers: Blocks of the model.
    """
    adapter = find_adapter_tensor(name)
    rules = (rule for pattern, rule in _RULES if re.search(pattern, name))
    rule = adapter[1].init if adapter else next(rules, "linear")
    full = torch.empty(full_shape(name, parameter.shape, _model_size()))
    _fill(full, rule, fan_in, num_layers, derive_generator(seed, f"initial weight {name}"))
    parameter.copy_(shard_weight(name, full, rank=mpu.get_model_parallel_rank(), size=_model_size()))


@torch.no_grad()
def zero_(module: M) -> M:
    """Sets all weights of a module to zero in place, so that it begins by adding nothing, and returns it."""
    for parameter in module.parameters():
        parameter.zero_()
    return module


def _model_size() -> int:
    return int(mpu.get_model_parallel_world_size())


def _fill(full: Tensor, rule: str, fan_in: int, num_layers: int, generator: torch.Generator) -> None:
    if rule == "ones":
        full.fill_(1.0)
    elif rule == "zeros":
        full.zero_()
    elif rule == "normal":
        full.normal_(std=_STD, generator=generator)
    elif rule == "scaled_normal":
        full.normal_(std=_STD / math.sqrt(2 * num_layers), generator=generator)
    elif rule == "xavier":
        nn.init.xavier_uniform_(full.flatten(1), generator=generator)
    else:
        bound = 1 / math.sqrt(fan_in)
        full.uniform_(-bound, bound, generator=generator)

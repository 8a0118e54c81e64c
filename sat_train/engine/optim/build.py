"""Config -> optimizer: the registered part that `deepspeed.optimizer.type` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch._dynamo  # the constructors of torch's optimizers do: here it is read before the work starts
from torch import Tensor, nn

from sat_train.config.parts.optimizer_parts import OptimizerConfig
from sat_train.models.trainable import ParameterGroup


def build_optimizer(
    choice: OptimizerConfig, groups: Sequence[ParameterGroup], tensors: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """Returns the optimizer over some of the trained weights.

    Args:
        choice: The part and its settings.
        groups: The groups of the whole model.
        tensors: What the optimizer steps, by the names of the parameters; a rank may have none.
    """
    parts: list[dict[str, Any]] = []
    for group in groups:
        names = [name for name in group.names if name in tensors]
        if names:
            parts.append(
                {
                    "params": [tensors[name] for name in names],
                    "names": names,
                    "weight_decay": group.weight_decay,
                    "lr_factor": group.lr_factor,
                }
            )
    nothing = {
        "params": [nn.Parameter(torch.zeros(1))],
        "names": ["none"],
        "weight_decay": 0.0,
        "lr_factor": 1.0,
    }
    return cast(torch.optim.Optimizer, choice.build(parts or [nothing]))

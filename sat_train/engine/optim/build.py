"""Config -> optimizer: the registered part that `deepspeed.optimizer.type` names."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from sat_train.config import RunConfig
from sat_train.models.trainable import group_parameters


def build_optimizer(config: RunConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer over the trainable parameters of `module`."""
    optimizer = config.deepspeed.optimizer
    groups = [
        {"params": [parameter for _, parameter in group.parameters], "weight_decay": group.weight_decay}
        for group in group_parameters(module, weight_decay=optimizer.params.weight_decay)
    ]
    return cast(torch.optim.Optimizer, optimizer.build(groups))

"""Config -> optimizer. Plain torch objects: DeepSpeed's own ones compile C++ at start."""

from __future__ import annotations

import torch
from torch import nn

from sat_train.config import RunConfig
from sat_train.models.trainable import group_parameters


def build_optimizer(config: RunConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer over the trainable parameters of `module`.

    `Adam` and `AdamW` both decouple the weight decay, as SAT's FusedEmaAdam does (`adam_w_mode`).
    """
    params = config.deepspeed.optimizer.params
    groups = [
        {"params": [parameter for _, parameter in group.parameters], "weight_decay": group.weight_decay}
        for group in group_parameters(module, weight_decay=params.weight_decay)
    ]
    return torch.optim.AdamW(groups, lr=params.lr, betas=params.betas, eps=params.eps)

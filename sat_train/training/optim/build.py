"""Config -> optimizer. Plain torch objects: DeepSpeed's own ones compile C++ at start."""

from __future__ import annotations

import torch
from torch import nn

from sat_train.config import RunConfig
from sat_train.training.optim.groups import parameter_groups


def build_optimizer(run: RunConfig, module: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer over the trainable parameters of `module`.

    `Adam` and `AdamW` both decouple the weight decay, as SAT's FusedEmaAdam does (`adam_w_mode`).
    """
    params = run.deepspeed.optimizer.params
    return torch.optim.AdamW(
        parameter_groups(module, weight_decay=params.weight_decay),
        lr=params.lr,
        betas=params.betas,
        eps=params.eps,
    )

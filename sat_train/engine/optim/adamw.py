"""AdamW, torch's own: DeepSpeed's optimizers compile C++ at start."""

from __future__ import annotations

from typing import Any

import torch

from sat_train.config.parts.optimizer_parts import AdamParams


def build(params: AdamParams, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns the optimizer over parameter groups."""
    return torch.optim.AdamW(groups, lr=params.lr, betas=params.betas, eps=params.eps)

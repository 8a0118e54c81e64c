"""AdamW, torch's own: DeepSpeed's optimizers compile C++ at start.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    w = w - lr decay w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2.
"""

from __future__ import annotations

from typing import Any

import torch

from sat_train.config.parts.optimizer_parts import AdamParams


def build(params: AdamParams, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns the optimizer over parameter groups: one pass over all state of a weight, on a CPU too."""
    return torch.optim.AdamW(groups, lr=params.lr, betas=params.betas, eps=params.eps, fused=True)

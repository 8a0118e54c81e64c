"""AdamW with 8-bit moments, that of bitsandbytes: prebuilt kernels, nothing is compiled at start.

Moments are quantised in blocks of 256 elements, each scaled by its largest one, on a non-linear scale. The
update is AdamW's (`adamw.py`), with the moments expanded to fp32 in the kernel.

Source: Dettmers et al., arXiv:2110.02861, sections 2 and 3.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from sat_train.config.parts.optimizer_parts import Adam8bitParams


def build(params: Adam8bitParams, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns the optimizer over parameter groups."""
    from bitsandbytes.optim.adamw import AdamW8bit

    optimizer = AdamW8bit(
        groups, lr=params.lr, betas=params.betas, eps=params.eps, min_8bit_size=params.min_8bit_size
    )
    return cast(torch.optim.Optimizer, optimizer)

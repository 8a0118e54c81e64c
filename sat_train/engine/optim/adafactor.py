"""Adafactor, that of transformers with a learning rate from outside.

    b = 1 - t^decay_rate
    r = b r + (1 - b) mean_rows(g^2 + eps1);  c = b c + (1 - b) mean_columns(g^2 + eps1)
    u = g / sqrt(r c / mean(r));  u = u / max(1, rms(u) / clip_threshold)
    a = lr max(eps2, rms(w));  w = w - a decay w - a u

A vector keeps its whole second moment. torch's Adafactor is not used: with its epsilon of 1e-7 the small
gradients of fine-tuning, below 3e-4 for a matrix, would not be normalised.

Source: Shazeer and Stern, arXiv:1804.04235, algorithm 5, without its relative step size.
"""

from __future__ import annotations

from typing import Any

import torch

from sat_train.config.parts.optimizer_parts import AdafactorParams


def build(params: AdafactorParams, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns the optimizer over parameter groups."""
    from transformers.optimization import Adafactor

    return Adafactor(
        groups,
        lr=params.lr,
        eps=params.eps,
        clip_threshold=params.clip_threshold,
        decay_rate=params.decay_rate,
        scale_parameter=params.scale_parameter,
        relative_step=False,
    )

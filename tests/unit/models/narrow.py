"""A narrow transformer and its inputs, for the tests of this folder and of the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sat_train.models.dit.transformer import DiffusionTransformer

NARROW: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": (1, 2, 2),
    "latent_size": (3, 4, 6),
    "text_hidden_size": 12,
    "text_length": 5,
    "time_embed_dim": 16,
    "positions": "rotary",
}


def build(**options: Any) -> DiffusionTransformer:
    """Builds a narrow transformer; options replace its numbers."""
    return DiffusionTransformer(**{**NARROW, **options})


def randomized(seed: int = 5, **options: Any) -> DiffusionTransformer:
    """Builds one whose blocks do something: the gates of a new one are zero."""
    dit = build(**options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return dit


def inputs(latent_size: tuple[int, int, int] = (3, 4, 6), batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Returns latent, timesteps and text."""
    generator = torch.Generator().manual_seed(6)
    frames, height, width = latent_size
    latent = torch.randn(batch, frames, 4, height, width, generator=generator)
    text = torch.randn(batch, 5, 12, generator=generator)
    return latent, torch.arange(batch) * 400 + 3, text

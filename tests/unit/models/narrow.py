"""A narrow transformer and its inputs, for the tests of this folder and of the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sat_train.models.dit.transformer import DiffusionTransformer
from tests.networks import build_network


def randomized(seed: int = 5, **options: Any) -> DiffusionTransformer:
    """Builds one whose blocks do something: the gates of a new one are zero."""
    dit = build_network(**options)
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

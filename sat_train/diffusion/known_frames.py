"""Sampling with frames that are known: they stay as they are, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from sat_train.diffusion.samplers import Denoise, DrawNoise, OnStep, Sampler
from sat_train.diffusion.timesteps import Spacing


def with_known_frames(sampler: Sampler, known_btchw: Tensor, is_known_bt: Tensor) -> Sampler:
    """Returns a sampler that holds some frames of the latent while the others are sampled.

    Frames meet in the network alone: a sampler's own steps go from each element to itself. So it is enough
    that the network, and whoever reads the result, see the known frames; this holds for every sampler.

    Args:
        sampler: The sampler.
        known_btchw: Clean latent; only the known frames of it count.
        is_known_bt: bool, True at these.
    """
    mask_btchw = is_known_bt[:, :, None, None, None]

    def held(latent_btchw: Tensor) -> Tensor:
        return torch.where(mask_btchw, known_btchw, latent_btchw)

    def sample(
        denoise: Denoise,
        draw_noise: DrawNoise,
        *,
        alpha_bar: Tensor,
        steps: int,
        spacing: Spacing = "trailing",
        on_step: OnStep | None = None,
    ) -> Tensor:
        latent_btchw = sampler(
            lambda latent, timestep: denoise(held(latent), timestep),
            draw_noise,
            alpha_bar=alpha_bar,
            steps=steps,
            spacing=spacing,
            on_step=on_step,
        )
        return held(latent_btchw)

    return sample

"""Timesteps that training draws, and those that a sampler visits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["trailing", "linspace"]


def timesteps_at(position_b: Tensor, num_timesteps: int) -> Tensor:
    """Returns the timesteps at positions in the schedule.

    Args:
        position_b: float64 in [0, 1], 0 for the cleanest, shape (b,).
        num_timesteps: Number of training timesteps.

    Returns:
        int64 timesteps in [0, num_timesteps), shape (b,).
    """
    return (position_b * num_timesteps).long().clamp_(max=num_timesteps - 1)


def stratify(uniform_b: Tensor, stratum_b: Tensor, num_strata: Tensor | int) -> Tensor:
    """Returns uniform numbers that cover [0, 1) evenly over an optimizer step, one stratum per sample.

    The range is divided into as many equal strata as the step has samples over all ranks. So the distribution
    over a step is the same at any world size, and that of a single sample over many steps stays uniform.

    Args:
        uniform_b: One float64 number in [0, 1) for each sample, shape (b,).
        stratum_b: int64 stratum of each sample, in [0, num_strata), shape (b,).
        num_strata: Samples of the step; one number, or int64 of shape (b,).

    Returns:
        float64 in [0, 1], shape (b,).

    Source: Kingma et al. 2021 (arXiv:2107.00630) appendix I.1. It replaces `uniform_sampling` of
    zai-org/CogVideo@7a1af71 `sgm/modules/diffusionmodules/sigma_sampling.py`, which stratifies by rank and
    only above 8 ranks.
    """
    return (stratum_b + uniform_b) / num_strata


def sampling_timesteps(
    steps: int, num_timesteps: int = 1000, spacing: Spacing = "trailing"
) -> list[tuple[int, int | None]]:
    """Returns a sampler's path through the schedule, from pure noise to clean.

    `trailing` goes from each timestep to the next one in the list. `linspace` reproduces diffusers' behaviour
    for CogVideoX-2B as released: each step jumps by `num_timesteps // steps`, whatever the next timestep is.

    Args:
        steps: Number of network evaluations.
        num_timesteps: Number of training timesteps.
        spacing: Spacing of the timesteps.

    Returns:
        Pairs (timestep, the timestep reached by the step); None stands for the clean latent.

    Source: diffusers 0.42 `CogVideoXDDIMScheduler.set_timesteps` and `.step`. For `trailing` the two agree
    if `steps` divides `num_timesteps`; otherwise diffusers jumps by a rounded stride and misses its own
    next timestep.
    """
    assert 1 <= steps <= num_timesteps, f"steps = {steps} is not in [1, {num_timesteps}]"
    if spacing == "trailing":
        timesteps = [round(num_timesteps - i * num_timesteps / steps) - 1 for i in range(steps)]
        reached: list[int | None] = [*timesteps[1:], None]
        return list(zip(timesteps, reached, strict=True))
    assert spacing == "linspace", f"unknown spacing {spacing!r}"
    timesteps = (
        torch.linspace(0, num_timesteps - 1, steps, dtype=torch.float64).round().long().flip(0).tolist()
    )
    stride = num_timesteps // steps
    return [(timestep, timestep - stride if timestep >= stride else None) for timestep in timesteps]

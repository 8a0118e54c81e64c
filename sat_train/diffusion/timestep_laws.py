"""Distributions of the training timesteps, each as the inverse of its distribution function.

A `TimestepLaw` turns uniform numbers, float64 in [0, 1) of any shape, into positions in the noise schedule
in [0, 1]: 0 is clean, 1 is pure noise. It never decreases, so uniform numbers that are spread over equal
parts of [0, 1) spread the timesteps over equally likely parts of the schedule.

A law may also have a method `levels(timesteps_b, latent_shape, num_timesteps) -> int64 [b, t]`: the timestep
of each latent frame as a function of the sample's, or -1 where the frame is exactly clean. Clean frames do
not count in the loss, and sampling is given them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sat_train.config.parts.timestep_parts import (
    LogitNormalParams,
    PrefixCleanParams,
    TruncatedNormalParams,
    UniformParams,
)

TimestepLaw = Callable[[Tensor], Tensor]
CLEAN = -1  # the level of a latent frame that has no noise; timestep 0 has a little


def uniform_law(uniform_b: Tensor) -> Tensor:
    """Returns its argument: every timestep is as likely as any other."""
    return uniform_b


def build_uniform(params: UniformParams) -> TimestepLaw:
    """Builds the uniform law."""
    return uniform_law


class PrefixClean:
    """Uniform timesteps for all but the first latent frames, which stay clean.

    Args:
        params: Its parameters.
    """

    def __init__(self, params: PrefixCleanParams) -> None:
        self.frames = params.frames

    def __call__(self, uniform_b: Tensor) -> Tensor:
        """Returns its argument."""
        return uniform_b

    def levels(self, timesteps_b: Tensor, latent_shape: Sequence[int], num_timesteps: int) -> Tensor:
        """Returns the samples' timesteps for each frame, and -1 for the first ones."""
        is_clean_t = torch.arange(latent_shape[1]) < self.frames
        return torch.where(is_clean_t, CLEAN, timesteps_b[:, None])


def build_logit_normal(params: LogitNormalParams) -> TimestepLaw:
    """Builds the law whose logit is normal.

    Source: Esser et al. 2024 (arXiv:2403.03206) section 3.1.
    """

    def law(uniform_b: Tensor) -> Tensor:
        return torch.sigmoid(params.mean + params.std * torch.special.ndtri(uniform_b))

    return law


def build_truncated_normal(params: TruncatedNormalParams) -> TimestepLaw:
    """Builds the normal law between two limits.

    Source: Bahmani et al. 2024 (arXiv:2411.18673, AC3D) which learns cameras from noisy timesteps.
    """
    limits = torch.tensor([params.low, params.high], dtype=torch.float64)
    low, high = torch.special.ndtr((limits - params.mean) / params.std)

    def law(uniform_b: Tensor) -> Tensor:
        normal_b: Tensor = torch.special.ndtri(low + (high - low) * uniform_b)
        return (params.mean + params.std * normal_b).clamp(params.low, params.high)

    return law

"""Slot `sampler` (`model.sampler_config`, `args.sampler`) and the samplers that come with the package.

A builder gets the parameters, and returns a `Sampler` (`sat_train/diffusion/samplers.py`): a function from
noise to a clean latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from sat_train.config.parts.guidance_parts import GuidanceConfig
from sat_train.config.parts.noise_schedule import ScheduleGroup
from sat_train.config.parts.registry import Choice, Params, part


class SamplerParams(Params):
    """Settings that every sampler has."""

    num_steps: int = Field(50, ge=1, description="Denoising steps.")
    guider_config: GuidanceConfig = Field(GuidanceConfig.default(), description="Classifier-free guidance.")
    discretization_config: ScheduleGroup | None = Field(
        None, description="null, or the same as the denoiser's."
    )

    def check(self, model: Any) -> Iterator[tuple[str, str]]:
        """Yields more steps than the noise schedule has."""
        if self.num_steps > model.schedule.num_timesteps:
            yield "num_steps", "at most the schedule's steps"


class SamplerConfig(Choice):
    """The sampler."""

    slot: ClassVar[str] = "sampler"

    target: str = Field("DPMPP2M", description="Kind of sampler.")
    params: SamplerParams = Field(description="Its settings.")


@part("sampler", "DDIM", build="sat_train.diffusion.ddim:build")
class DDIMParams(SamplerParams):
    """DDIM without noise."""


@part("sampler", "DPMPP2M", build="sat_train.diffusion.dpmpp_2m:build")
class DPMPP2MParams(SamplerParams):
    """DPM++ 2M for the variance-preserving SDE."""

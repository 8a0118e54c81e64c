"""Slot `guidance` (`guider_config` of the sampler) and the guidance that comes with the package.

A builder gets the parameters, and returns a `Guidance` (`sat_train/diffusion/guidance.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from sat_train.config.parts.registry import Choice, Params, part


class GuidanceParams(Params):
    """Base of the settings of classifier-free guidance; `args.guidance_scale` is its scale."""

    scale: float = Field(6.0, ge=0, description="Guidance scale.")


class GuidanceConfig(Choice):
    """Classifier-free guidance."""

    slot: ClassVar[str] = "guidance"

    target: str = Field("DynamicGuidance", description="Kind of guidance.")
    params: GuidanceParams = Field(description="Its settings.")


@part("guidance", "ConstantGuidance", build="sat_train.diffusion.constant_guidance:build")
class ConstantGuidanceParams(GuidanceParams):
    """One guidance scale for all steps."""

    scale: float = Field(6.0, ge=0, description="Guidance scale; 1 is without guidance.")


@part("guidance", "DynamicGuidance", build="sat_train.diffusion.dynamic_guidance:build")
class DynamicGuidanceParams(GuidanceParams):
    """CogVideoX's cosine guidance as released: the scale moves between 1 and 1 + scale with the timestep."""

    scale: float = Field(6.0, ge=0, description="The guidance scale is at most 1 more than this.")
    exp: float = Field(5.0, gt=0, multiple_of=1, description="Exponent of the formula, a whole number.")
    num_steps: int | None = Field(None, ge=1, description="null, or the sampler's number of steps.")

    def check(self, model: Any) -> Iterator[tuple[str, str]]:
        """Yields a number of steps other than the sampler's: guidance grows over all of them."""
        if self.num_steps not in (None, model.sampling_steps):
            yield "num_steps", f"null, or the sampler's {model.sampling_steps}"

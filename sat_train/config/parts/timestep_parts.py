"""Slot `timesteps` (`sigma_sampler_config` of the loss) and the distributions that come with the package.

A builder gets the parameters, and returns a `TimestepLaw` (`sat_train/diffusion/timestep_laws.py`): a
function from uniform random numbers to positions in the noise schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from sat_train.config.parts.noise_schedule import ScheduleGroup
from sat_train.config.parts.registry import Choice, Params, part

_MOST_DEVIATIONS = 6  # beyond them the tail of a normal distribution has too few digits


class TimestepsParams(Params):
    """Settings that every law of the timesteps has.

    A law that `has_levels` gives single frames a timestep of their own, and may keep the first ones clean:
    sampling is then given these.
    """

    has_levels: ClassVar[bool] = False

    num_idx: int = Field(1000, ge=2, description="Steps of the schedule.")
    uniform_sampling: bool = Field(
        False,
        description="Stratify: the samples of an optimizer step, over all ranks, are spread evenly over the "
        "distribution.",
    )
    discretization_config: ScheduleGroup | None = Field(
        None, description="null, or the same as the denoiser's."
    )


class TimestepsConfig(Choice):
    """Timesteps of training."""

    slot: ClassVar[str] = "timesteps"

    target: str = Field("Uniform", description="Distribution of the timesteps.")
    params: TimestepsParams = Field(description="Its settings.")


@part("timesteps", "Uniform", build="sat_train.diffusion.timestep_laws:build_uniform")
class UniformParams(TimestepsParams):
    """Each timestep is as likely as any other: CogVideo's DiscreteSampling."""


@part("timesteps", "PrefixClean", build="sat_train.diffusion.timestep_laws:PrefixClean")
class PrefixCleanParams(TimestepsParams):
    """The first latent frames stay clean and the others are noised: the model continues given frames."""

    has_levels = True

    frames: int = Field(1, ge=1, description="Latent frames that stay clean, padding in front included.")

    def check(self, model: Any) -> Iterator[tuple[str, str]]:
        """Yields a number that divides a patch, whose frames have one timestep."""
        if self.frames % model.patch[0]:
            yield "frames", f"a multiple of {model.patch[0]}, the frames of a patch"


@part("timesteps", "LogitNormal", build="sat_train.diffusion.timestep_laws:build_logit_normal")
class LogitNormalParams(TimestepsParams):
    """The sigmoid of a normal number: mostly the middle of the schedule (arXiv:2403.03206)."""

    mean: float = Field(0.0, ge=-10, le=10, description="Of the normal number; above 0 noisier timesteps.")
    std: float = Field(1.0, gt=0, le=10, description="Of the normal number.")


@part("timesteps", "TruncatedNormal", build="sat_train.diffusion.timestep_laws:build_truncated_normal")
class TruncatedNormalParams(TimestepsParams):
    """A normal number between two limits, in parts of the schedule: 0 is clean, 1 pure noise."""

    mean: float = Field(0.5, description="Before the truncation.")
    std: float = Field(0.25, gt=0, description="Before the truncation.")
    low: float = Field(0.0, ge=0, lt=1, description="Least noise.")
    high: float = Field(1.0, gt=0, le=1, description="Most noise.")

    def check(self, model: Any) -> Iterator[tuple[str, str]]:
        """Yields limits out of order, and a mean so far from them that nearly nothing lies between them."""
        reach = _MOST_DEVIATIONS * self.std
        if self.low >= self.high:
            yield "high", f"above low = {self.low:g}"
        elif not self.low - reach <= self.mean <= self.high + reach:
            yield "mean", f"within {_MOST_DEVIATIONS} std of the limits {self.low:g} and {self.high:g}"

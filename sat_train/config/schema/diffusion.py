"""The diffusion process: noise schedule and training loss."""

from __future__ import annotations

from pydantic import Field

from sat_train.config.parts.noise_schedule import ScheduleGroup
from sat_train.config.parts.record import Record


class DenoiserParams(Record):
    """Input and prediction of the network."""

    num_idx: int = Field(1000, ge=2, description="Steps of the schedule.")
    discretization_config: ScheduleGroup = Field(
        ScheduleGroup(), description="THE noise schedule of the model."
    )


class DenoiserGroup(Record):
    """The denoiser."""

    params: DenoiserParams = Field(DenoiserParams(), description="Its settings.")


class TimestepsParams(Record):
    """Distribution of the timesteps in training."""

    num_idx: int = Field(1000, ge=2, description="Steps of the schedule.")
    uniform_sampling: bool = Field(
        False,
        description="Spread the timesteps of one step evenly over the schedule, at any number of ranks.",
    )
    discretization_config: ScheduleGroup | None = Field(
        None, description="null, or the same as the denoiser's."
    )


class TimestepsGroup(Record):
    """Timesteps of training."""

    params: TimestepsParams = Field(TimestepsParams(), description="Its settings.")


class LossParams(Record):
    """The training loss: mean squared error of v, in fp32."""

    offset_noise_level: float = Field(0.0, ge=0, description="Extra noise shared by all pixels of a frame.")
    min_snr_value: float | None = Field(
        None, gt=0, description="Largest weight on the x0 error (min-SNR); null: no limit."
    )
    sigma_sampler_config: TimestepsGroup = Field(TimestepsGroup(), description="Timesteps of training.")


class LossGroup(Record):
    """The training loss."""

    params: LossParams = Field(LossParams(), description="Its settings.")

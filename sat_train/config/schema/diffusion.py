"""The diffusion process: noise schedule and training loss."""

from __future__ import annotations

from pydantic import Field

from sat_train.config.parts.noise_parts import NoiseConfig
from sat_train.config.parts.noise_schedule import ScheduleGroup
from sat_train.config.parts.record import Record
from sat_train.config.parts.timestep_parts import TimestepsConfig


class DenoiserParams(Record):
    """Input and prediction of the network."""

    num_idx: int = Field(1000, ge=2, description="Steps of the schedule.")
    discretization_config: ScheduleGroup = Field(
        ScheduleGroup(), description="THE noise schedule of the model."
    )


class DenoiserGroup(Record):
    """The denoiser."""

    params: DenoiserParams = Field(DenoiserParams(), description="Its settings.")


class LossParams(Record):
    """The training loss: mean squared error of v, in fp32."""

    offset_noise_level: float = Field(
        0.0, ge=0, description="Deviation of noise that all of a sample shares, for brightness."
    )
    min_snr_value: float | None = Field(
        None, gt=0, description="Largest weight on the x0 error (min-SNR); null: no limit."
    )
    sigma_sampler_config: TimestepsConfig = Field(
        TimestepsConfig.default(), description="Timesteps of training."
    )
    noise_config: NoiseConfig = Field(
        NoiseConfig.default(), description="Noise of training, and the first noise of sampling."
    )


class LossGroup(Record):
    """The training loss."""

    params: LossParams = Field(LossParams(), description="Its settings.")

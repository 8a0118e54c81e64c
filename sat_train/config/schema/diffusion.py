"""The diffusion process: noise schedule, training loss, sampler and guidance."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sat_train.config.parts.record import Record


class ZeroSNRDDPMDiscretizationParams(Record):
    """The noise schedule: linear beta, shifted in signal-to-noise ratio, with no signal at the last step."""

    linear_start: float = Field(0.00085, gt=0, lt=1, description="First beta.")
    linear_end: float = Field(0.0120, gt=0, lt=1, description="Last beta.")
    num_timesteps: int = Field(1000, ge=2, description="Steps of the schedule.")
    shift_scale: float = Field(
        1.0, gt=0, description="The signal-to-noise ratio is divided by this: 3.0 for 2B, else 1.0."
    )
    keep_start: bool = Field(False, description="Keep the first step where it was before the shift.")
    post_shift: bool = Field(False, description="Shift after the last step was set to zero signal.")


class ScheduleGroup(Record):
    """The noise schedule."""

    params: ZeroSNRDDPMDiscretizationParams = Field(
        ZeroSNRDDPMDiscretizationParams(), description="Its settings."
    )


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


class ConstantGuidanceParams(Record):
    """One guidance scale for all steps."""

    scale: float = Field(6.0, ge=0, description="Guidance scale; 1 is without guidance.")


class ConstantGuidanceSlot(Record):
    """Constant guidance."""

    target: Literal["ConstantGuidance"] = Field(description="Kind of guidance.")
    params: ConstantGuidanceParams = Field(ConstantGuidanceParams(), description="Its settings.")


class DynamicGuidanceParams(Record):
    """CogVideoX's cosine guidance as released: the scale moves between 1 and 1 + scale with the timestep."""

    scale: float = Field(6.0, ge=0, description="The guidance scale is at most 1 more than this.")
    exp: float = Field(5.0, gt=0, multiple_of=1, description="Exponent of the formula, a whole number.")
    num_steps: int | None = Field(None, ge=1, description="null, or the sampler's number of steps.")


class DynamicGuidanceSlot(Record):
    """Dynamic guidance."""

    target: Literal["DynamicGuidance"] = Field("DynamicGuidance", description="Kind of guidance.")
    params: DynamicGuidanceParams = Field(DynamicGuidanceParams(), description="Its settings.")


GuidanceSlot = Annotated[ConstantGuidanceSlot | DynamicGuidanceSlot, Field(discriminator="target")]


class SamplerParams(Record):
    """Settings of the sampler."""

    num_steps: int = Field(50, ge=1, description="Denoising steps.")
    guider_config: GuidanceSlot = Field(DynamicGuidanceSlot(), description="Classifier-free guidance.")
    discretization_config: ScheduleGroup | None = Field(
        None, description="null, or the same as the denoiser's."
    )


class DDIMSlot(Record):
    """DDIM without noise."""

    target: Literal["DDIM"] = Field(description="Kind of sampler.")
    params: SamplerParams = Field(SamplerParams(), description="Its settings.")


class DPMPP2MSlot(Record):
    """DPM++ 2M for the variance-preserving SDE."""

    target: Literal["DPMPP2M"] = Field("DPMPP2M", description="Kind of sampler.")
    params: SamplerParams = Field(SamplerParams(), description="Its settings.")


SamplerSlot = Annotated[DDIMSlot | DPMPP2MSlot, Field(discriminator="target")]

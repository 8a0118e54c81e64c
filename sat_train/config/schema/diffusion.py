"""The diffusion process: noise schedule, training loss, sampler and guidance."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sat_train.config.schema.record import No, NoParams, Record


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


class ZeroSNRDDPMDiscretizationSlot(Record):
    """The noise schedule."""

    target: Literal["ZeroSNRDDPMDiscretization"] = Field(
        "ZeroSNRDDPMDiscretization", description="Kind of noise schedule."
    )
    params: ZeroSNRDDPMDiscretizationParams = Field(
        ZeroSNRDDPMDiscretizationParams(), description="Its settings."
    )


class EpsWeightingSlot(Record):
    """Weight 1/(1 - alpha_bar) on the x0 error, which is the plain error of v."""

    target: Literal["EpsWeighting"] = Field("EpsWeighting", description="Kind of loss weight.")
    params: NoParams = Field(NoParams(), description="It has none.")


class VideoScalingSlot(Record):
    """The network predicts v."""

    target: Literal["VideoScaling"] = Field("VideoScaling", description="Kind of prediction.")
    params: NoParams = Field(NoParams(), description="It has none.")


class DiscreteDenoiserParams(Record):
    """What the network is given and what it predicts."""

    num_idx: int = Field(1000, ge=2, description="Steps of the schedule.")
    quantize_c_noise: No = Field(False, description="Timesteps are exact already.")
    weighting_config: EpsWeightingSlot = Field(EpsWeightingSlot(), description="Weight of the loss.")
    scaling_config: VideoScalingSlot = Field(VideoScalingSlot(), description="What is predicted.")
    discretization_config: ZeroSNRDDPMDiscretizationSlot = Field(
        ZeroSNRDDPMDiscretizationSlot(), description="THE noise schedule of the model."
    )


class DiscreteDenoiserSlot(Record):
    """The denoiser."""

    target: Literal["DiscreteDenoiser"] = Field("DiscreteDenoiser", description="Kind of denoiser.")
    params: DiscreteDenoiserParams = Field(DiscreteDenoiserParams(), description="Its settings.")


class DiscreteSamplingParams(Record):
    """Which timesteps training sees."""

    num_idx: int = Field(1000, ge=2, description="Steps of the schedule.")
    uniform_sampling: bool = Field(
        False,
        description="Spread the timesteps of one step evenly over the schedule, at any number of ranks.",
    )
    discretization_config: ZeroSNRDDPMDiscretizationSlot | None = Field(
        None, description="null, or the same as the denoiser's."
    )


class DiscreteSamplingSlot(Record):
    """Timesteps of training."""

    target: Literal["DiscreteSampling"] = Field("DiscreteSampling", description="Kind of timestep choice.")
    params: DiscreteSamplingParams = Field(DiscreteSamplingParams(), description="Its settings.")


class VideoDiffusionLossParams(Record):
    """The training loss: mean squared error of v, in fp32."""

    offset_noise_level: float = Field(0.0, ge=0, description="Extra noise shared by all pixels of a frame.")
    min_snr_value: float | None = Field(
        None, gt=0, description="Largest weight on the x0 error (min-SNR); null: no limit."
    )
    sigma_sampler_config: DiscreteSamplingSlot = Field(
        DiscreteSamplingSlot(), description="Timesteps of training."
    )


class VideoDiffusionLossSlot(Record):
    """The training loss."""

    target: Literal["VideoDiffusionLoss"] = Field("VideoDiffusionLoss", description="Kind of loss.")
    params: VideoDiffusionLossParams = Field(VideoDiffusionLossParams(), description="Its settings.")


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
    """How samples are drawn."""

    num_steps: int = Field(50, ge=1, description="Denoising steps.")
    guider_config: GuidanceSlot = Field(DynamicGuidanceSlot(), description="Classifier-free guidance.")
    discretization_config: ZeroSNRDDPMDiscretizationSlot | None = Field(
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

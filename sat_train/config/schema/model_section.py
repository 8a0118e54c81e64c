"""Section `model`: the transformer, its frozen helpers and the diffusion process, in CogVideo's shape."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sat_train.config.parts.condition_parts import ConditionConfig
from sat_train.config.parts.loss_term_parts import LossTermConfig
from sat_train.config.parts.module_parts import ModuleConfig
from sat_train.config.parts.record import PlainName, Record, Texts
from sat_train.config.parts.sampler_parts import SamplerConfig
from sat_train.config.schema.diffusion import DenoiserGroup, LossGroup
from sat_train.config.schema.encoder_slots import ConditionerGroup, VideoVAEGroup
from sat_train.config.schema.network import DiffusionTransformerSlot


class TrainConfig(Record):
    """Weights that train at a learning rate of their own."""

    match: Texts = Field(
        min_length=1, description="Regular expressions searched in the names of weights; each must find one."
    )
    lr: float = Field(1.0, gt=0, description="Factor on the learning rate.")


class ModelConfig(Record):
    """One member of the CogVideoX family."""

    scale_factor: float = Field(
        1.0, gt=0, description="Latents are multiplied by this before the transformer sees them."
    )
    image_latent_scale: float | None = Field(
        None,
        gt=0,
        description="Factor on the latent of the first frame (image-to-video); null: `scale_factor`.",
    )
    noised_image_input: bool = Field(
        False, description="Image-to-video: the latent of the first frame is a second input."
    )
    noised_image_dropout: float = Field(
        0.0, ge=0, le=1, description="Share of samples trained without the image."
    )
    noised_image_log_mean: float = Field(
        -3.0,
        ge=-30,
        le=1,
        description="Mean of the logarithm of the noise on the first frame, in pixels of -1 to 1.",
    )
    noised_image_log_std: float = Field(0.5, ge=0, le=5, description="Its standard deviation.")
    not_trainable_prefixes: Texts = Field(
        (), description="Prefixes of the names of frozen weights; all: everything but adapters."
    )
    freeze: Texts = Field(
        (), description="Regular expressions of the names of further frozen weights; each must find one."
    )
    train: dict[PlainName, TrainConfig] = Field(
        {}, description="Weights that train whatever else freezes them, by a name of your own: match and lr."
    )
    null_condition: Literal["zero", "empty_prompt"] = Field(
        "zero", description="Replacement of a dropped caption: a zero embedding, or the encoded empty prompt."
    )
    conditions: dict[PlainName, ConditionConfig] = Field(
        {}, description="Further inputs of the model, by a name of your own: target, params and drop."
    )
    modules: dict[PlainName, ModuleConfig] = Field(
        {}, description="Further network modules, by a name of your own: target and params."
    )
    hook_order: dict[PlainName, Texts] = Field(
        {}, description="By hook, names of modules that act around one step, outermost first."
    )
    network_config: DiffusionTransformerSlot = Field(description="The transformer.")
    conditioner_config: ConditionerGroup = Field(description="The text encoder.")
    first_stage_config: VideoVAEGroup = Field(description="The video autoencoder.")
    denoiser_config: DenoiserGroup = Field(DenoiserGroup(), description="Noise schedule and prediction.")
    loss_fn_config: LossGroup = Field(LossGroup(), description="The training loss.")
    loss_terms: dict[PlainName, LossTermConfig] = Field(
        {},
        description="Terms of the training loss, by a name of your own: target, weight, params. "
        "`diffusion` is the model's own error, with weight 1 if it is not named.",
    )
    sampler_config: SamplerConfig = Field(SamplerConfig.default(), description="Settings of the sampler.")

    @property
    def freezes_base(self) -> bool:
        """True if the base is frozen: by name, or next to modules where nothing says what trains."""
        says = self.not_trainable_prefixes or self.freeze or self.train
        has_adapters = self.network_config.params.modules.lora_config is not None
        return "all" in self.not_trainable_prefixes or bool(self.modules and not says and not has_adapters)

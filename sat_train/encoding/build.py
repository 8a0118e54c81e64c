"""Configuration -> the frozen encoders, the conditions, and the stage that encodes a run's samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sat_train.config import ModelSpec, RunConfig
from sat_train.config.parts.condition_parts import ConditionConfig
from sat_train.distributed.processes import ProcessMesh
from sat_train.encoding.conditions.condition import Condition
from sat_train.encoding.conditions.image import ImageCondition, OfsCondition
from sat_train.encoding.conditions.text import TextCondition
from sat_train.encoding.digests import open_cache
from sat_train.encoding.stage import EncodingStage, read_empty_prompt
from sat_train.interchange.locate import check_state_dict, read_vae_weights
from sat_train.models.build import compute_dtype, encoder_dtype
from sat_train.models.encoders import Encoders
from sat_train.models.text.t5 import T5TextEncoder
from sat_train.models.vae.build import build_vae
from sat_train.models.vae.video_vae import VideoVAE

# the value in diffusers' pipeline and CogVideo's sampling of CogVideoX1.5-I2V
_OFS = 2.0

Mode = Literal["off", "read", "fill", "require", "write"]


def build_encoding(config: RunConfig, mesh: ProcessMesh, mode: Mode | None = None) -> EncodingStage:
    """Builds the stage that encodes a run's samples; the only reader of `data.cache`.

    Args:
        config: The configuration.
        mesh: The process mesh.
        mode: `write` fills the cache without reading it, for precompute; None uses `data.cache`.

    Raises:
        DataError: As `open_cache`.
        CheckpointError: Likewise.

    Ranks: all.
    """
    data = config.require_data()
    mode = mode or data.cache
    cache = None if mode == "off" else open_cache(config, mesh, "read" if mode == "fill" else mode)
    encoders = build_encoders(config, mesh.device, lambda: read_empty_prompt(cache))
    return EncodingStage(
        encoders=encoders,
        conditions=build_conditions(config, encoders),
        cache=cache,
        keeps=mode in ("fill", "write"),
        needs_empty_prompt=config.model.null_condition == "empty_prompt",
        shard_bytes=int(data.cache_shard_mb * 1e6),
    )


def build_conditions(config: RunConfig, encoders: Encoders) -> tuple[Condition, ...]:
    """Builds the conditions of the model."""
    model, spec = config.model, config.spec
    text: Condition = TextCondition(
        null=model.null_condition,
        empty_prompt=encoders.empty_prompt,
        drop_probability=spec.caption_dropout,
    )
    conditions = [text]
    if model.noised_image_input:
        drop_probability = model.noised_image_dropout
        conditions.append(ImageCondition(scale=spec.image_latent_scale, drop_probability=drop_probability))
    if spec.ofs_width is not None:
        conditions.append(OfsCondition(_OFS))
    return (*conditions, *(_build_own(name, choice, spec) for name, choice in model.conditions.items()))


def _build_own(name: str, choice: ConditionConfig, spec: ModelSpec) -> Condition:
    condition: Condition = choice.build(spec)
    condition.name, condition.settings = name, choice.params.model_dump(mode="json")
    condition.drop_probability, condition.drop_purpose = choice.drop, f"condition_drop.{name}"
    return condition


def build_encoders(
    config: RunConfig, device: torch.device, known_empty_prompt: Callable[[], Tensor | None] = lambda: None
) -> Encoders:
    """Builds the frozen encoders; none is loaded yet.

    Args:
        config: The configuration.
        device: Their device.
        known_empty_prompt: Returns the embedding of the empty prompt, if it need not be encoded.
    """
    return Encoders(
        load_vae=lambda: build_loaded_vae(config, device),
        load_text_encoder=lambda: build_loaded_text_encoder(config, device),
        geometry=config.spec,
        dtype=compute_dtype(config.args),
        device=device,
        known_empty_prompt=known_empty_prompt,
    )


def build_loaded_text_encoder(config: RunConfig, device: torch.device) -> T5TextEncoder:
    """Builds the text encoder with its weights."""
    text, dtype = config.spec.text, encoder_dtype(config.args)
    return T5TextEncoder.from_folder(text.model_dir, max_length=text.max_length, dtype=dtype, device=device)


def build_loaded_vae(config: RunConfig, device: torch.device) -> VideoVAE:
    """Builds the autoencoder with the weights of `first_stage_config.params.ckpt_path`."""
    spec, path = config.spec, config.spec.vae.ckpt_path
    state_dict = read_vae_weights(path)
    expected = build_vae(spec, device="meta").state_dict()
    check_state_dict(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {name: tuple(tensor.shape) for name, tensor in state_dict.items()},
        where=path,
    )
    return build_vae(spec, state_dict=state_dict, device=device, dtype=encoder_dtype(config.args))

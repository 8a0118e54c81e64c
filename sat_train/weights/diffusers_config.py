"""The JSON files of a diffusers model folder, from section `model`.

Source: huggingface/diffusers@0.42 `CogVideoXTransformer3DModel`, `AutoencoderKLCogVideoX`,
`CogVideoXDPMScheduler`,
    `CogVideoXPipeline`, and the configuration files of the released models.
"""

from __future__ import annotations

import math
from typing import Any

from sat_train.config import ModelConfig
from sat_train.config.schema.network import (
    DiffusionTransformerParams,
    Rotary3DPositionEmbeddingParams,
    Sincos3DPositionEmbeddingParams,
)
from sat_train.log import get_logger

log = get_logger(__name__)

_FORMAT_VERSION = "0.30.0"  # of the first diffusers that had CogVideoX
_BLOCKS = ("CogVideoXDownBlock3D", "CogVideoXUpBlock3D")


def has_learned_positions(model: ModelConfig) -> bool:
    """Returns whether the position table is a weight (5B-I2V)."""
    positions = model.network_config.params.modules.pos_embed_config.params
    return isinstance(positions, Rotary3DPositionEmbeddingParams) and positions.learnable_pos_embed


def transformer_config(model: ModelConfig) -> dict[str, Any]:
    """Returns `transformer/config.json`."""
    network = model.network_config.params
    positions = network.modules.pos_embed_config.params
    patch_frames, patch_height, patch_width = network.patch_size
    assert patch_height == patch_width, f"patches of {patch_height}x{patch_width}"
    space, time = _interpolation(network)
    return {
        "_class_name": "CogVideoXTransformer3DModel",
        "_diffusers_version": _FORMAT_VERSION,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": network.hidden_size // network.num_attention_heads,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": network.in_channels,
        "max_text_seq_length": positions.text_length,
        "norm_elementwise_affine": network.elementwise_affine,
        "norm_eps": 1e-05,
        "num_attention_heads": network.num_attention_heads,
        "num_layers": network.num_layers,
        "ofs_embed_dim": network.ofs_embed_dim,
        "out_channels": network.out_channels,
        # 1.0 says it by leaving the temporal patch out
        "patch_bias": patch_frames == 1,
        "patch_size": patch_height,
        "patch_size_t": None if patch_frames == 1 else patch_frames,
        "sample_frames": network.num_frames,
        "sample_height": network.latent_height,
        "sample_width": network.latent_width,
        "spatial_interpolation_scale": space,
        "temporal_compression_ratio": network.time_compressed_rate,
        "temporal_interpolation_scale": time,
        "text_embed_dim": network.modules.patch_embed_config.params.text_hidden_size,
        "time_embed_dim": network.time_embed_dim or network.hidden_size,
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": has_learned_positions(model),
        "use_rotary_positional_embeddings": isinstance(positions, Rotary3DPositionEmbeddingParams),
    }


def scheduler_config(model: ModelConfig) -> dict[str, Any]:
    """Returns `scheduler/scheduler_config.json`."""
    schedule = model.denoiser_config.params.discretization_config.params
    is_ddim = model.sampler_config.target == "DDIM"
    return {
        "_class_name": "CogVideoXDDIMScheduler" if is_ddim else "CogVideoXDPMScheduler",
        "_diffusers_version": _FORMAT_VERSION,
        "beta_end": schedule.linear_end,
        "beta_schedule": "scaled_linear",
        "beta_start": schedule.linear_start,
        "clip_sample": False,
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "snr_shift_scale": schedule.shift_scale,
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    }


def vae_config(model: ModelConfig) -> dict[str, Any]:
    """Returns `vae/config.json`."""
    coder = model.first_stage_config.params.encoder_config.params
    network = model.network_config.params
    levels = len(coder.ch_mult)
    return {
        "_class_name": "AutoencoderKLCogVideoX",
        "_diffusers_version": _FORMAT_VERSION,
        "act_fn": "silu",
        "block_out_channels": [coder.ch * factor for factor in coder.ch_mult],
        "down_block_types": [_BLOCKS[0]] * levels,
        "force_upcast": True,
        "in_channels": coder.in_channels,
        "invert_scale_latents": _inverts_image_scale(model),
        "latent_channels": coder.z_channels,
        "layers_per_block": coder.num_res_blocks,
        "norm_eps": 1e-06,
        "norm_num_groups": coder.norm_num_groups,
        "out_channels": model.first_stage_config.params.decoder_config.params.out_ch,
        "sample_height": network.latent_height * 2 ** (levels - 1),
        "sample_width": network.latent_width * 2 ** (levels - 1),
        "scaling_factor": model.scale_factor,
        "temporal_compression_ratio": coder.temporal_compress_times,
        "up_block_types": [_BLOCKS[1]] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def model_index(model: ModelConfig) -> dict[str, Any]:
    """Returns `model_index.json`."""
    pipeline = "CogVideoXImageToVideoPipeline" if model.noised_image_input else "CogVideoXPipeline"
    return {
        "_class_name": pipeline,
        "_diffusers_version": _FORMAT_VERSION,
        "scheduler": ["diffusers", scheduler_config(model)["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def _interpolation(network: DiffusionTransformerParams) -> tuple[float, float]:
    """CogVideo's files say it in one of two places; together they multiply."""
    own = network.modules.pos_embed_config.params
    if not isinstance(own, Sincos3DPositionEmbeddingParams):
        return network.height_interpolation, network.time_interpolation
    return (
        own.height_interpolation * network.height_interpolation,
        own.time_interpolation * network.time_interpolation,
    )


def _inverts_image_scale(model: ModelConfig) -> bool:
    """diffusers multiplies the image latent by the scale factor (1.0) or divides by it (1.5), and no more."""
    scale = model.image_latent_scale
    if not model.noised_image_input or scale is None or math.isclose(scale, model.scale_factor, rel_tol=1e-3):
        return False
    if not math.isclose(scale, 1 / model.scale_factor, rel_tol=1e-3):
        log.warning(
            "model.image_latent_scale = %g cannot be expressed in diffusers, which will use %g",
            scale,
            1 / model.scale_factor,
        )
    return True

"""The JSON files of a diffusers model folder, from the numbers of a model.

Source: huggingface/diffusers@0.42 `CogVideoXTransformer3DModel`, `AutoencoderKLCogVideoX`,
`CogVideoXDPMScheduler`,
    `CogVideoXPipeline`, and the configuration files of the released models.
"""

from __future__ import annotations

import math
from typing import Any

from sat_train.config import ModelSpec
from sat_train.errors import CheckpointError
from sat_train.log import get_logger

log = get_logger(__name__)

_FORMAT_VERSION = "0.30.0"  # of the first diffusers that had CogVideoX
_SINCOS, _ROTARY = "Sincos3DPositionEmbedding", "Rotary3DPositionEmbedding"
_SCHEDULERS = {"DDIM": "CogVideoXDDIMScheduler", "DPMPP2M": "CogVideoXDPMScheduler"}
_BLOCKS = ("CogVideoXDownBlock3D", "CogVideoXUpBlock3D")


def transformer_config(spec: ModelSpec) -> dict[str, Any]:
    """Returns `transformer/config.json`.

    Raises:
        CheckpointError: diffusers has no such position embedding.
    """
    is_1_0 = spec.family == "1.0"
    patch_frames, patch_height, patch_width = spec.patch
    assert patch_height == patch_width, f"patches of {patch_height}x{patch_width}"
    time, space, _ = spec.interpolation
    frames, height, width = spec.trained_frames, *spec.trained_latent[1:]
    return {
        "_class_name": "CogVideoXTransformer3DModel",
        "_diffusers_version": _FORMAT_VERSION,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": spec.head_width,
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": spec.in_channels,
        "max_text_seq_length": spec.text_length,
        "norm_elementwise_affine": spec.affine_norms,
        "norm_eps": 1e-05,
        "num_attention_heads": spec.heads,
        "num_layers": spec.layers,
        "ofs_embed_dim": spec.ofs_width,
        "out_channels": spec.out_channels,
        # 1.0 says it by leaving the temporal patch out
        "patch_bias": is_1_0,
        "patch_size": patch_height,
        "patch_size_t": None if is_1_0 else patch_frames,
        "sample_frames": frames,
        "sample_height": height,
        "sample_width": width,
        "spatial_interpolation_scale": space,
        "temporal_compression_ratio": spec.temporal_compression,
        "temporal_interpolation_scale": time,
        "text_embed_dim": spec.text_width,
        "time_embed_dim": spec.time_width,
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": has_learned_positions(spec),
        "use_rotary_positional_embeddings": spec.positions.target == _ROTARY,
    }


def has_learned_positions(spec: ModelSpec) -> bool:
    """Returns whether the model has a learned table of positions (5B-I2V).

    Raises:
        CheckpointError: diffusers has no such position embedding.
    """
    if spec.positions.target not in (_SINCOS, _ROTARY):
        raise CheckpointError(
            f"diffusers has no position embedding {spec.positions.target}",
            expected=f"{_SINCOS} or {_ROTARY}",
            remedy="convert with --to sat, and sample with sat-train sample",
        )
    return spec.positions.params.num_weights(1, 1) > 0


def scheduler_config(spec: ModelSpec) -> dict[str, Any]:
    """Returns `scheduler/scheduler_config.json`."""
    schedule, sampler = spec.schedule, spec.sampler.target
    if sampler not in _SCHEDULERS:
        log.warning("diffusers has no sampler %s, and will use DPMPP2M", sampler)
    return {
        "_class_name": _SCHEDULERS.get(sampler, _SCHEDULERS["DPMPP2M"]),
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


def vae_config(spec: ModelSpec) -> dict[str, Any]:
    """Returns `vae/config.json`."""
    coder, side = spec.coder, spec.spatial_compression
    levels = len(coder.ch_mult)
    _, height, width = spec.trained_latent
    return {
        "_class_name": "AutoencoderKLCogVideoX",
        "_diffusers_version": _FORMAT_VERSION,
        "act_fn": "silu",
        "block_out_channels": [coder.ch * factor for factor in coder.ch_mult],
        "down_block_types": [_BLOCKS[0]] * levels,
        "force_upcast": True,
        "in_channels": coder.in_channels,
        "invert_scale_latents": _inverts_image_scale(spec),
        "latent_channels": coder.z_channels,
        "layers_per_block": coder.num_res_blocks,
        "norm_eps": 1e-06,
        "norm_num_groups": coder.norm_num_groups,
        "out_channels": coder.out_ch,
        "sample_height": height * side,
        "sample_width": width * side,
        "scaling_factor": spec.latent_scale,
        "temporal_compression_ratio": coder.temporal_compress_times,
        "up_block_types": [_BLOCKS[1]] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def model_index(spec: ModelSpec) -> dict[str, Any]:
    """Returns `model_index.json`."""
    pipeline = "CogVideoXImageToVideoPipeline" if "image" in spec.conditions else "CogVideoXPipeline"
    return {
        "_class_name": pipeline,
        "_diffusers_version": _FORMAT_VERSION,
        "scheduler": ["diffusers", scheduler_config(spec)["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def _inverts_image_scale(spec: ModelSpec) -> bool:
    """diffusers multiplies the image latent by the scale factor (1.0) or divides by it (1.5), and no more."""
    scale, inverse = spec.image_latent_scale, 1 / spec.latent_scale
    if "image" not in spec.conditions or math.isclose(scale, spec.latent_scale, rel_tol=1e-3):
        return False
    if not math.isclose(scale, inverse, rel_tol=1e-3):
        log.warning(
            "model.image_latent_scale = %g cannot be expressed in diffusers, which will use %g",
            scale,
            inverse,
        )
    return True

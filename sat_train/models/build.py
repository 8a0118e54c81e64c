"""Section `model` -> networks."""

from __future__ import annotations

import torch

from sat_train.config import ArgsConfig, ModelConfig
from sat_train.config.schema.network import (
    DiffusionTransformerParams,
    Rotary3DPositionEmbeddingParams,
    Rotary3DPositionEmbeddingSlot,
)
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.lora import add_lora


def build_dit(
    model: ModelConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    activation_checkpointing: bool = False,
    seed: int = 0,
    initialize: bool = True,
    with_adapters: bool = True,
) -> DiffusionTransformer:
    """Builds the transformer, with adapters when the section has them.

    Args:
        model: Section `model`.
        device: Where the weights live; `meta` costs neither time nor memory.
        dtype: Dtype of the weights; adapters are fp32.
        activation_checkpointing: See `DiffusionTransformer`.
        seed: Seed of the initial weights.
        initialize: False leaves the transformer's weights unset, for loading over; adapters are always set.
        with_adapters: False leaves the section's adapters out: the weights bring their own.

    Raises:
        ConfigError: An adapter's target matches no layer.

    Ranks: all; each builds its slice.
    """
    params, modules = model.network_config.params, model.network_config.params.modules
    positions = modules.pos_embed_config
    rotary = positions.params if isinstance(positions, Rotary3DPositionEmbeddingSlot) else None
    dit = DiffusionTransformer(
        num_layers=params.num_layers,
        hidden_size=params.hidden_size,
        num_attention_heads=params.num_attention_heads,
        in_channels=params.in_channels,
        out_channels=params.out_channels,
        patch_size=params.patch_size,
        latent_size=_latent_size(params),
        text_hidden_size=modules.patch_embed_config.params.text_hidden_size,
        text_length=positions.params.text_length,
        time_embed_dim=params.time_embed_dim or params.hidden_size,
        positions=_kind(rotary),
        interpolation=_interpolation(params),
        rotary_theta=rotary.theta if rotary else 10000.0,
        ofs_embed_dim=params.ofs_embed_dim,
        qk_norm=modules.adaln_layer_config.params.qk_ln,
        elementwise_affine=params.elementwise_affine,
        size_policy=positions.params.size_policy,
        activation_checkpointing=activation_checkpointing,
        device=device,
        dtype=dtype,
        init_seed=seed if initialize else None,
    )
    if with_adapters and modules.lora_config is not None:
        lora = modules.lora_config.params
        add_lora(
            dit, rank=lora.r, alpha=lora.lora_alpha, dropout=lora.dropout, targets=lora.targets, seed=seed
        )
    return dit


def compute_dtype(args: ArgsConfig) -> torch.dtype:
    """Returns what the transformer computes in: `args.bf16`, `args.fp16` or float32."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32


def _kind(rotary: Rotary3DPositionEmbeddingParams | None) -> str:
    if rotary is None:
        return "sincos"
    return "rotary_learned" if rotary.learnable_pos_embed else "rotary"


def _latent_size(params: DiffusionTransformerParams) -> tuple[int, int, int]:
    frames = (params.num_frames - 1) // params.time_compressed_rate + 1
    return frames, params.latent_height, params.latent_width


def _interpolation(params: DiffusionTransformerParams) -> tuple[float, float, float]:
    """CogVideo's files say it in one of two places; together they multiply."""
    own = params.modules.pos_embed_config.params
    names = ("time_interpolation", "height_interpolation", "width_interpolation")
    t, h, w = (getattr(params, name) * getattr(own, name, 1.0) for name in names)
    return t, h, w

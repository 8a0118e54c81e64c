"""Config -> the models of a run, with their weights."""

from __future__ import annotations

import torch

from sat_train.checkpoint.manifest import BaseWeights
from sat_train.checkpoint.sources import hash_weights
from sat_train.checkpoint.weights import (
    check_state_dict,
    load_weights,
    read_transformer_weights,
    read_vae_weights,
)
from sat_train.config import RunConfig
from sat_train.distributed.collectives import broadcast_object
from sat_train.distributed.processes import ProcessGrid
from sat_train.log import get_logger
from sat_train.models.build import build_dit
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.lora import adapter_state_dict
from sat_train.models.text.build import build_text_encoder
from sat_train.models.text.t5 import T5TextEncoder
from sat_train.models.trainable import select_trainable
from sat_train.models.vae.build import build_vae
from sat_train.models.vae.video_vae import VideoVAE
from sat_train.pipeline.build import build_pipeline, compute_dtype
from sat_train.pipeline.video_diffusion import VideoDiffusion

log = get_logger(__name__)


def build_models(
    run: RunConfig, grid: ProcessGrid, *, with_encoders: bool = True, null_text_ld: torch.Tensor | None = None
) -> VideoDiffusion:
    """Builds transformer, autoencoder and text encoder with their weights, and says what trains.

    Args:
        run: The configuration.
        grid: The process grid.
        with_encoders: Off, there is neither autoencoder nor text encoder: all batches come from the cache.
        null_text_ld: The encoded empty prompt, where there is no text encoder to make it.

    Raises:
        ConfigError: An adapter's target or a prefix of frozen weights matches nothing.
        CheckpointError: Weights are missing, damaged or of another shape.

    Ranks: all.
    """
    return build_pipeline(
        run,
        dit=build_trained_dit(run, grid),
        vae=build_loaded_vae(run, grid.device, encoder_dtype(run)) if with_encoders else None,
        text_encoder=build_loaded_text_encoder(run, grid.device) if with_encoders else None,
        null_text_ld=null_text_ld,
    )


def encoder_dtype(run: RunConfig) -> torch.dtype:
    """Returns what the frozen encoders compute in: half precision wherever the transformer does."""
    return torch.bfloat16 if run.args.bf16 or run.args.fp16 else torch.float32


def build_loaded_text_encoder(run: RunConfig, device: torch.device) -> T5TextEncoder:
    """Builds the text encoder with its weights."""
    params = run.model.conditioner_config.params.emb_models[0].params
    return build_text_encoder(params, device=device, dtype=encoder_dtype(run))


def build_trained_dit(run: RunConfig, grid: ProcessGrid) -> DiffusionTransformer:
    """Builds the transformer with the weights of `args.load`, or new ones; freezes what does not train."""
    dit = build_dit(
        run.model,
        device=grid.device,
        dtype=compute_dtype(run.args),
        activation_checkpointing=run.args.checkpoint_activations,
        seed=run.args.seed,
        initialize=run.args.load is None,
    )
    if run.args.load is not None:
        weights = read_transformer_weights(
            run.args.load, model_rank=grid.model_rank, model_size=grid.model_size
        )
        load_weights(dit, weights, may_lack=dit.derived_keys() | adapter_state_dict(dit).keys())
    summary = select_trainable(dit, not_trainable_prefixes=run.model.not_trainable_prefixes)
    log.info("weights of the transformer%s:\n%s", _of_one_rank(grid), summary)
    return dit


def build_loaded_vae(run: RunConfig, device: torch.device, dtype: torch.dtype) -> VideoVAE:
    """Builds the autoencoder with the weights of `first_stage_config.params.ckpt_path`."""
    params = run.model.first_stage_config.params
    state_dict = read_vae_weights(params.ckpt_path)
    expected = build_vae(params, device="meta").state_dict()
    check_state_dict(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {name: tuple(tensor.shape) for name, tensor in state_dict.items()},
        where=str(params.ckpt_path),
    )
    return build_vae(params, state_dict=state_dict, device=device, dtype=dtype)


def base_weights_of(run: RunConfig, grid: ProcessGrid) -> BaseWeights | None:
    """Returns what the adapters of a LoRA run stand on; None when checkpoints hold all weights.

    Ranks: all; rank 0 reads the files to hash them.
    """
    if run.args.load is None or run.model.network_config.params.modules.lora_config is None:
        return None
    sha256 = hash_weights(run.args.load) if grid.rank == 0 else None
    return BaseWeights(source=run.args.load, sha256=broadcast_object(grid, sha256))


def _of_one_rank(grid: ProcessGrid) -> str:
    return f" (one of {grid.model_size} slices)" if grid.model_size > 1 else ""

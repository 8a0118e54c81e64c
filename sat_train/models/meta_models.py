"""Config -> models and inputs on the meta device, where nothing is allocated: for counting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat_train.config import RunConfig
from sat_train.errors import CheckpointError
from sat_train.models.build import build_dit, compute_dtype, encoder_dtype
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.frozen_layers import hold_frozen_weights
from sat_train.models.text.t5_encoder import T5_XXL, T5Encoder, T5Settings
from sat_train.models.text.t5_folder import find_t5_folders, read_settings
from sat_train.models.trainable import select_configured
from sat_train.models.vae.build import build_vae
from sat_train.models.vae.video_vae import VideoVAE


def counts_modules(config: RunConfig) -> bool:
    """Returns whether there are modules, and the shape of all that conditions give them is known."""
    return bool(config.spec.modules) and all(config.spec.condition_widths.values())


def counting_key(config: RunConfig) -> tuple[object, ...]:
    """Returns what a count depends on besides settings of `args`: model, size of clips, dtype."""
    data = config.require_data().params
    # its `transformer_args` repeat settings of `args`
    tree = config.model.model_dump(exclude={"network_config": {"params": {"transformer_args"}}})
    return repr(tree), data.max_num_frames, data.video_size, compute_dtype(config.args)


def build_meta_dit(config: RunConfig, *, layers: int | None = None) -> DiffusionTransformer:
    """Builds the transformer of a run, which trains and holds what the run does.

    Args:
        config: The configuration.
        layers: Blocks, without modules that cannot be counted; None: the model as it is.

    Ranks: any; it is this rank's slice.
    """
    spec, meta = replace(config.spec, layers=layers or config.spec.layers), torch.device("meta")
    if layers is not None and not counts_modules(config):
        spec = replace(spec, modules={})
    dit = build_dit(
        spec,
        device=meta,
        dtype=compute_dtype(config.args),
        recompute=config.args.recompute,
        inputs_on_host=config.args.checkpoint_offload,
        initialize=False,
    )
    select_configured(dit, config.model)
    if layers is not None:
        hold_frozen_weights(dit, device=meta, quantization=config.args.quantize_base)
    return dit


def build_meta_vae(config: RunConfig) -> VideoVAE:
    """Builds the autoencoder of a run."""
    return build_vae(config.spec, device="meta", dtype=encoder_dtype(config.args))


def build_meta_text_encoder(config: RunConfig) -> T5Encoder:
    """Builds the text encoder of a run; where its folder is not there, T5-XXL."""
    try:
        settings = T5Settings(**read_settings(find_t5_folders(Path(config.spec.text.model_dir))[0]))
    except CheckpointError:
        settings = T5_XXL
    with torch.device("meta"):
        return T5Encoder(settings).to(encoder_dtype(config.args)).requires_grad_(False)


def build_meta_latent(config: RunConfig, batch_size: int, channels: int) -> Tensor:
    """Builds latents of the clips of a run, with so many channels."""
    data = config.require_data().params
    latent = config.spec.latent(data.max_num_frames, *data.video_size)
    shape = (batch_size, latent.padded_frames, channels, latent.height, latent.width)
    return torch.empty(shape, device="meta", dtype=compute_dtype(config.args))


def build_meta_inputs(config: RunConfig, batch_size: int) -> dict[str, Any]:
    """Builds the inputs of the transformer's forward in training."""
    spec, dtype = config.spec, compute_dtype(config.args)
    text = (batch_size, spec.text.max_length, spec.text_width)
    widths = {name: width for name, width in spec.condition_widths.items() if width}
    inputs: dict[str, Any] = {
        "latent_btchw": build_meta_latent(config, batch_size, spec.in_channels),
        "extras": {name: build_meta_latent(config, batch_size, width) for name, width in widths.items()},
        "timesteps_b": torch.empty(batch_size, dtype=torch.int64, device="meta"),
        "text_bld": torch.empty(text, device="meta", dtype=dtype),
    }
    if spec.ofs_width:
        inputs["ofs_b"] = torch.empty(batch_size, device="meta", dtype=dtype)
    return inputs

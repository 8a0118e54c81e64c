"""Configuration -> the frozen encoders and the cache of what they give."""

from __future__ import annotations

import torch

from sat_train.config import RunConfig
from sat_train.data.cache.samples import OpenCache
from sat_train.data.cache.shards import ShardWriter
from sat_train.distributed.processes import ProcessMesh
from sat_train.interchange.locate import check_state_dict, read_vae_weights
from sat_train.log import get_logger
from sat_train.models.text.build import build_text_encoder
from sat_train.models.text.t5 import T5TextEncoder
from sat_train.models.vae.build import build_vae
from sat_train.models.vae.video_vae import VideoVAE

log = get_logger(__name__)


def load_encoders(config: RunConfig, device: torch.device) -> tuple[VideoVAE, T5TextEncoder]:
    """Loads both encoders in the middle of a run, whose random numbers stay as they are."""
    log.warning("a sample is not in the cache after all: loading T5 and the VAE")
    with torch.random.fork_rng():
        return build_loaded_vae(config, device, encoder_dtype(config)), build_loaded_text_encoder(
            config, device
        )


def encoder_dtype(config: RunConfig) -> torch.dtype:
    """Returns what the frozen encoders compute in: half precision wherever the transformer does."""
    return torch.bfloat16 if config.args.bf16 or config.args.fp16 else torch.float32


def build_loaded_text_encoder(config: RunConfig, device: torch.device) -> T5TextEncoder:
    """Builds the text encoder with its weights."""
    return build_text_encoder(config.spec.text, device=device, dtype=encoder_dtype(config))


def build_loaded_vae(config: RunConfig, device: torch.device, dtype: torch.dtype) -> VideoVAE:
    """Builds the autoencoder with the weights of `first_stage_config.params.ckpt_path`."""
    spec, path = config.spec, config.spec.vae.ckpt_path
    state_dict = read_vae_weights(path)
    expected = build_vae(spec, device="meta").state_dict()
    check_state_dict(
        {name: tuple(tensor.shape) for name, tensor in expected.items()},
        {name: tuple(tensor.shape) for name, tensor in state_dict.items()},
        where=path,
    )
    return build_vae(spec, state_dict=state_dict, device=device, dtype=dtype)


def build_writer(
    config: RunConfig, mesh: ProcessMesh, cache: OpenCache, *, waits: bool = False
) -> ShardWriter:
    """Returns the writer of this rank into the cache; see `ShardWriter`."""
    shard_bytes = int(config.require_data().cache_shard_mb * 1e6)
    return ShardWriter(cache.folder, rank=mesh.rank, shard_bytes=shard_bytes, waits=waits)

"""A very small transformer and its weights in every form that people have."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sat_train.models.dit.sharding import shard_weight
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.weights.diffusers_keys import transformer_to_diffusers
from tests.networks import build_network

PREFIX = "model.diffusion_model."


def build_transformer(**options: object) -> DiffusionTransformer:
    return build_network(**{"width": 32, "latent_size": (3, 4, 4), "time_width": 8, **options})


def random_weights(seed: int = 0, dtype: torch.dtype = torch.float32, **options: object) -> dict[str, Tensor]:
    """Random weights under SAT's keys."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {key: value.shape for key, value in build_transformer(**options).state_dict().items()}
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}


def write_sat_folder(
    folder: Path, weights: dict[str, Tensor], *, model_size: int = 1, extra: dict[str, Tensor] | None = None
) -> Path:
    """`latest` and one file a rank of the model axis, as SAT writes them."""
    (folder / "1000").mkdir(parents=True)
    (folder / "latest").write_text("1000")
    for rank in range(model_size):
        module = {
            PREFIX + key: shard_weight(key, value, rank=rank, size=model_size).clone()
            for key, value in weights.items()
        }
        torch.save(
            {"module": {**module, **(extra or {})}, "iteration": 1000},
            folder / "1000" / f"mp_rank_{rank:02d}_model_states.pt",
        )
    return folder


def write_diffusers_folder(folder: Path, weights: dict[str, Tensor], *, shards: int = 1) -> Path:
    """`transformer/` of a diffusers model folder."""
    tensors = {k: v.contiguous() for k, v in transformer_to_diffusers(weights).items()}
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    stem = "diffusion_pytorch_model"
    if shards == 1:
        save_file(tensors, folder / "transformer" / f"{stem}.safetensors")
        return folder
    weight_map = {
        key: f"{stem}-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, key in enumerate(tensors)
    }
    for name in sorted(set(weight_map.values())):
        save_file({k: tensors[k] for k in tensors if weight_map[k] == name}, folder / "transformer" / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "transformer" / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder

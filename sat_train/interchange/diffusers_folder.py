"""Writes a diffusers model folder: transformer and scheduler, and VAE and text encoder if they are known."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sat_train.config import ModelSpec
from sat_train.config.paths import expand_assets
from sat_train.config.reading import RESOLVED
from sat_train.errors import CheckpointError
from sat_train.files import read_text, reading, write_text
from sat_train.interchange.locate import (
    read_transformer_weights,
    read_vae_weights,
    unflattened,
)
from sat_train.log import get_logger
from sat_train.models.text.t5_folder import CONFIG, find_t5_folders, publishable_files, read_settings
from sat_train.weights.diffusers_config import (
    has_learned_positions,
    model_index,
    scheduler_config,
    transformer_config,
    vae_config,
)
from sat_train.weights.diffusers_keys import parts_of_sat_key, transformer_to_diffusers
from sat_train.weights.diffusers_vae_keys import vae_state_to_diffusers
from sat_train.weights.lazy import LazyWeights, check_same, from_tensors
from sat_train.weights.names import check_names_and_shapes
from sat_train.weights.safetensors_out import Progress, write_safetensors

log = get_logger(__name__)

STEM = "diffusion_pytorch_model"
_MOST_CONFIG_BYTES = 1_000_000
# Keys of diffusers' config.json that define the model.
_STRUCTURE = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "patch_size",
    "patch_size_t",
    "max_text_seq_length",
    "text_embed_dim",
    "time_embed_dim",
    "ofs_embed_dim",
    "use_rotary_positional_embeddings",
    "use_learned_positional_embeddings",
)
# Keys of config.json that define an encoder, besides its sizes.
_T5_ENCODER = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "is_encoder_decoder": False,
    "use_cache": False,
    "tie_word_embeddings": False,
}


def write_pipeline(
    folder: Path,
    weights: LazyWeights,
    model: ModelSpec,
    *,
    metadata: Mapping[str, str],
    progress: Callable[[int], Progress],
) -> None:
    """Writes a model folder and compares its transformer with the source.

    Args:
        folder: An empty folder.
        weights: The transformer's weights under SAT's keys.
        model: Its numbers; names VAE and text encoder.
        metadata: Texts for the headers of the weights.
        progress: As for `convert`.

    Raises:
        CheckpointError: A key or the position embedding is unknown to diffusers, or the written weights read
            back differently.
        OSError: The disk is full or cannot be written.
    """
    theirs = transformer_to_diffusers(weights, learned_positions=has_learned_positions(model))
    (folder / "transformer").mkdir()
    write_safetensors(
        folder / "transformer", STEM, theirs, metadata=metadata, progress=progress(theirs.num_bytes)
    )
    _write_json(folder / "transformer" / "config.json", transformer_config(model))
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(model))
    whole = _write_vae(folder, model) & _link_text_encoder(folder, model)
    if whole:
        _write_json(folder / "model_index.json", model_index(model))
    _check_written(folder / "transformer", weights, theirs)


def check_model(weights: LazyWeights, model: ModelSpec, *, source: Path) -> None:
    """Checks that weights belong to the model whose numbers `config.json` will hold.

    Args:
        weights: The transformer's weights under SAT's keys.
        model: Its numbers.
        source: Source of the weights; if it is a diffusers folder, its `config.json` is compared too.

    Raises:
        CheckpointError: The weights belong to another model.
    """
    from sat_train.distributed.processes import start_single_process
    from sat_train.models.build import build_dit

    start_single_process()
    dit = build_dit(model, device="meta", dtype=torch.float32, with_adapters=False)
    expected = {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}
    where = f"{weights.where}, to be written as the model of --base or of the run's {RESOLVED},"
    shapes = {name: unflattened(shape, expected.get(name)) for name, shape in weights.shapes.items()}
    check_names_and_shapes(expected, shapes, where=where, may_lack=dit.derived_keys())
    _check_own_config(model, source)


def _check_own_config(model: ModelSpec, source: Path) -> None:
    """Compares numbers that shapes do not show, such as text tokens and the kind of positions."""
    path = next(
        (p for p in (source / "transformer" / "config.json", source / "config.json") if p.is_file()), None
    )
    if path is None:
        return
    with reading(path, error=CheckpointError, expected="the configuration of a CogVideoX transformer"):
        own = dict(json.loads(read_text(path, limit=_MOST_CONFIG_BYTES)))
    ours = transformer_config(model)
    differing = [
        f"{key}: {own[key]} there, {ours[key]} here"
        for key in _STRUCTURE
        if own.get(key, ours[key]) != ours[key]
    ]
    if differing:
        raise CheckpointError(
            f"{path} describes another model than the one to be written: {'; '.join(differing)}",
            expected="the YAML of these weights",
            remedy="name their preset, e.g. --base configs/model/cogvideox_5b.yaml",
        )


def _check_written(folder: Path, weights: LazyWeights, theirs: LazyWeights) -> None:
    back = read_transformer_weights(folder)
    exported = weights.select(
        lambda key: key if any(p.diffusers_key in theirs for p in parts_of_sat_key(key)) else None
    )
    check_same(exported, back)


def _write_vae(folder: Path, model: ModelSpec) -> bool:
    path = model.vae.ckpt_path
    if not path or not Path(expand_assets(path)).exists():
        log.warning("no VAE at '%s': the folder will lack vae/ and model_index.json", path)
        return False
    tensors = vae_state_to_diffusers(read_vae_weights(path))
    (folder / "vae").mkdir()
    lazy = from_tensors(tensors, where=str(path))
    write_safetensors(folder / "vae", STEM, lazy, metadata={}, progress=lambda size: None)
    _write_json(folder / "vae" / "config.json", vae_config(model))
    return True


def _link_text_encoder(folder: Path, model: ModelSpec) -> bool:
    """Links T5's files, 9 to 19 GB that are unchanged; copies them if the file system has no hard links."""
    path = Path(expand_assets(model.text.model_dir))
    try:
        encoder, tokenizer = find_t5_folders(path)
        tokenizer_files = list(publishable_files(tokenizer, tokenizer=True))
        weight_files = list(publishable_files(encoder, tokenizer=False))
        settings = read_settings(encoder)
    except CheckpointError as error:
        log.warning("%s\n  the folder will lack text_encoder/ and model_index.json", error)
        return False
    _link_files(tokenizer_files, folder / "tokenizer")
    _link_files(weight_files, folder / "text_encoder")
    _write_json(folder / "text_encoder" / CONFIG, {**_T5_ENCODER, **settings})
    return True


def _link_files(files: Sequence[Path], dest: Path) -> None:
    dest.mkdir()
    for path in files:
        try:
            os.link(path.resolve(), dest / path.name)
        except OSError:
            shutil.copyfile(path, dest / path.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")

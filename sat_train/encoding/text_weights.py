"""Reads the text encoder from its folder."""

from __future__ import annotations

from pathlib import Path

import torch

from sat_train.errors import CheckpointError
from sat_train.models.text.t5 import T5TextEncoder
from sat_train.models.text.t5_encoder import T5Encoder, T5Settings
from sat_train.models.text.t5_folder import (
    CONFIG,
    LEAST_BYTES_OF_A_WEIGHT,
    bytes_of_weights,
    find_t5_folders,
    read_settings,
)
from sat_train.models.text.tokenizer import read_tokenizer
from sat_train.weights.lazy import LazyWeights
from sat_train.weights.names import check_names_and_shapes
from sat_train.weights.readers import read_index, read_weight_files

_ADAPTER = "adapter_config.json"


def read_text_encoder(
    folder: str | Path,
    *,
    max_length: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> T5TextEncoder:
    """Reads an encoder from disk, each tensor straight into `dtype`; never from a network.

    Args:
        folder: A T5 folder (config.json, weights, spiece.model), a diffusers model with `text_encoder/` and
            `tokenizer/`, or such a `text_encoder/` itself.
        max_length: Tokens of every caption.
        dtype: fp32 or bf16; T5 v1.1 overflows in fp16.
        device: Where it goes.

    Raises:
        CheckpointError: The folder, a file in it or a weight is missing, damaged, or of another shape.
    """
    assert dtype in (torch.float32, torch.bfloat16), f"T5 in {dtype}: fp32 and bf16 only"
    weights_folder, tokenizer_folder = find_t5_folders(Path(folder))
    transformer = _read_transformer(weights_folder, dtype)
    tokenizer = read_tokenizer(tokenizer_folder)
    if tokenizer.size > (known := transformer.shared.num_embeddings):
        raise CheckpointError(
            f"the tokenizer in {tokenizer_folder} has {tokenizer.size:,} tokens, the encoder knows {known:,}",
            expected="the tokenizer that the encoder was trained with",
            remedy="copy the tokenizer's files of google/t5-v1_1-xxl into it",
        )
    return T5TextEncoder(transformer=transformer, tokenizer=tokenizer, max_length=max_length).to(device)


def _read_settings(folder: Path) -> T5Settings:
    """Returns the settings of an encoder, after checking them against the size of the weights."""
    settings = T5Settings(**read_settings(folder))
    held = bytes_of_weights(folder)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in T5Encoder(settings).parameters())
    if count * LEAST_BYTES_OF_A_WEIGHT > held:
        raise CheckpointError(
            f"{folder / CONFIG} claims {count:,} weights, but the files next to it have {held:,} bytes",
            expected="all weights that it calls for, in at least 16 bits each",
            remedy="check that every shard is there and that config.json belongs to the weights",
        )
    return settings


def _read_transformer(folder: Path, dtype: torch.dtype) -> T5Encoder:
    """Reads the weights; a decoder's among them are left out."""
    settings = _read_settings(folder)
    if (folder / _ADAPTER).exists():
        raise CheckpointError(
            f"{folder} holds {_ADAPTER}, which leads to other weights",
            expected="an encoder without adapters",
            remedy="take the file out of the folder",
        )
    with torch.device("meta"):
        transformer = T5Encoder(settings)
    expected = {name: tuple(weight.shape) for name, weight in transformer.state_dict().items()}
    weights = _open_weights(folder).select(_own_name)
    if missing := sorted(expected.keys() - weights.keys()):
        raise CheckpointError(
            f"T5 weights in {folder} lack {len(missing)} tensors: {', '.join(missing[:8])}",
            expected="all weights that its config.json calls for",
            remedy="check that every shard of the index is there and that config.json belongs to the weights",
        )
    weights = weights.select(lambda name: name if name in expected else None)
    check_names_and_shapes(expected, weights.shapes, where=f"T5 in {folder}")
    transformer.load_state_dict({name: weights[name].to(dtype) for name in expected}, assign=True)
    return transformer


def _open_weights(folder: Path) -> LazyWeights:
    """Opens the weights of a folder, in the order of preference of transformers: safetensors, whole files."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file() or index.is_file():
            return read_weight_files([whole] if whole.is_file() else read_index(index))
    raise CheckpointError(
        f"T5 weights in {folder} cannot be read: there is no file of a known name",
        expected="model.safetensors, or model.safetensors.index.json and its shards",
        remedy="compare the folder with its source and copy missing files again",
    )


def _own_name(name: str) -> str:
    """Returns the name of a weight here: a file of the encoder alone may hold its embedding there."""
    return "shared.weight" if name == "encoder.embed_tokens.weight" else name

"""Reads a T5 folder: a fixed list of its files, and a fixed list of keys of its config.json.

`transformers` takes config.json whole: it may name kernels or adapters to fetch, quantisation, or sizes of
any height. So it is read here, by a list of what is known, and compared with the weights that are there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sat_train.errors import CheckpointError
from sat_train.files import open_regular, read_text, reading, refuse_packed

CONFIG = "config.json"
TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_WEIGHTS = re.compile(r"(?:pytorch_)?model(?:[.-][\w.-]*)?\.(?:safetensors|bin)(?:\.index\.json)?")
_MOST_TEXT_BYTES = 100_000_000
# Highest sizes that are believed; those of T5 v1.1 XXL are far below.
_SIZES = {
    "vocab_size": 1_000_000,
    "d_model": 65_536,
    "d_kv": 4_096,
    "d_ff": 1_000_000,
    "num_layers": 256,
    "num_heads": 1_024,
    "relative_attention_num_buckets": 4_096,
    "relative_attention_max_distance": 1_000_000,
    "pad_token_id": 1_000_000,
    "eos_token_id": 1_000_000,
}
_FEED_FORWARD = ("relu", "gelu", "gated-gelu", "gated-silu")
LEAST_BYTES_OF_A_WEIGHT = 2
_TOKENIZERS = ("spiece.model", "tokenizer.json")  # of which one is enough
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin")


def weight_files(folder: Path) -> list[Path]:
    """Returns the weight files and their index, by name."""
    return sorted(path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name))


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the known keys of a T5's config.json.

    Raises:
        CheckpointError: It is no T5's, or a size is none.
    """
    path = folder / CONFIG
    with reading(path, error=CheckpointError, expected="the configuration of a T5 v1.1 encoder"):
        content = dict(json.loads(read_text(path, limit=_MOST_TEXT_BYTES)))
        if content.get("model_type", "t5") != "t5":
            raise ValueError(f"model_type is {content['model_type']}, not t5")
        settings = {key: value for key, value in content.items() if key in _SIZES and value is not None}
        for key, value in settings.items():
            if (
                type(value) is not int
                or not (key.endswith("_id") or value > 0)
                or not 0 <= value <= _SIZES[key]
            ):
                raise ValueError(f"{key} is {value}, expected a whole number up to {_SIZES[key]}")
        if (kind := content.get("feed_forward_proj", "relu")) not in _FEED_FORWARD:
            raise ValueError(f"feed_forward_proj is {kind}, expected one of {', '.join(_FEED_FORWARD)}")
        epsilon = float(content.get("layer_norm_epsilon", 1e-6))
        if not 0 < epsilon < 1:
            raise ValueError(f"layer_norm_epsilon is {epsilon}, expected a number between 0 and 1")
    return {**settings, "feed_forward_proj": kind, "layer_norm_epsilon": epsilon}


def find_t5_folders(folder: Path) -> tuple[Path, Path]:
    """Finds the folders of weights and tokenizer below a path.

    Args:
        folder: A T5 folder, or a diffusers model with `text_encoder/` and `tokenizer/`.

    Returns:
        The folder with config.json and weights, and the folder with the tokenizer.

    Raises:
        CheckpointError: One of them is not there.
    """
    with reading(
        f"T5 folder {str(folder)[:200]}", error=CheckpointError, expected="a folder on this machine"
    ):
        return _find_t5_folders(folder)


def _find_t5_folders(folder: Path) -> tuple[Path, Path]:
    if not folder.is_dir():
        raise CheckpointError(
            f"T5 folder {folder} does not exist",
            expected="a folder on this machine; nothing is downloaded",
            remedy="download google/t5-v1_1-xxl, or use the folder of a diffusers CogVideoX model",
        )
    homes = (folder, folder / "text_encoder")
    weights = next((place for place in homes if (place / "config.json").is_file()), None)
    if weights is None or not any(any(weights.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise CheckpointError(
            f"{folder} holds no T5 encoder",
            expected="config.json and model*.safetensors there or in its text_encoder/",
            remedy="check model.conditioner_config.params.emb_models[0].params.model_dir",
        )
    places = (folder, folder / "tokenizer", folder.parent / "tokenizer")
    tokenizer = next((f for f in places if any((f / name).is_file() for name in _TOKENIZERS)), None)
    if tokenizer is None:
        raise CheckpointError(
            f"{folder} holds no T5 tokenizer",
            expected=f"{' or '.join(_TOKENIZERS)} there or in tokenizer/ next to text_encoder/",
            remedy="copy the tokenizer's files of google/t5-v1_1-xxl into it",
        )
    return weights, tokenizer


def check_tokenizer_files(folder: Path) -> None:
    """Checks that the files of a tokenizer are regular files of a plausible size.

    Raises:
        CheckpointError: One is not.
    """
    for path in (folder / name for name in TOKENIZER_FILES):
        with reading(path, error=CheckpointError, expected="a tokenizer's file"):
            if path.exists():
                with open_regular(path) as file:
                    if file.seek(0, 2) > _MOST_TEXT_BYTES:
                        raise ValueError(f"has more than {_MOST_TEXT_BYTES:,} bytes")


def bytes_of_weights(folder: Path) -> int:
    """Returns the size of all weight files.

    Raises:
        CheckpointError: One is no regular file, or an index names others.
    """
    return sum(_checked_size(path) for path in weight_files(folder))


def _checked_size(path: Path) -> int:
    """Returns the size of a weight file in bytes; an index has no size of its own, and names other files."""
    with reading(path, error=CheckpointError, expected="weights of T5"):
        if path.suffix != ".json":
            refuse_packed(path)
            return path.stat().st_size
        weight_map = json.loads(read_text(path, limit=_MOST_TEXT_BYTES))["weight_map"]
        if outside := [name for name in weight_map.values() if not _WEIGHTS.fullmatch(name)]:
            raise ValueError(f"names {outside[0]}, which is not a weight file next to it")
        return 0


def publishable_files(folder: Path, *, tokenizer: bool) -> Iterator[Path]:
    """Yields the files that an exported model may hold: known names, regular files, from this folder only.

    Raises:
        CheckpointError: A link that leads out of the folder; those into the store of a Hugging Face cache,
            which a snapshot is made of, are followed.
    """
    paths = [folder / name for name in TOKENIZER_FILES] if tokenizer else weight_files(folder)
    root = folder.resolve()
    allowed = next((parent.parent for parent in root.parents if parent.name == "snapshots"), root)
    for path in paths:
        target = path.resolve()
        if not path.is_file():
            continue
        if not target.is_relative_to(allowed):
            raise CheckpointError(
                f"{path} is a link that leads to {target}, outside of its folder",
                expected="files of T5, which are copied into the model that is written",
                remedy="put the file itself in its place",
            )
        yield path

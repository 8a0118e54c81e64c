"""The frozen T5 v1.1 encoder that CogVideoX was trained with.

Captions are padded to a fixed length and encoded WITHOUT an attention mask: padding is attended to, and its
    outputs are part of what the
transformer reads. That is how the released models were trained, in SAT and in diffusers alike; a mask would
change every embedding.

Source: THUDM/CogVideo@7a1af71 `sat/sgm/modules/encoders/modules.py` FrozenT5Embedder; diffusers 0.42
`pipeline_cogvideox.py` _get_t5_prompt_embeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from sat_train.errors import CheckpointError
from sat_train.files import reading
from sat_train.models.text.t5_folder import check_tokenizer_files, read_config

_TOKENIZER_FILES = ("spiece.model", "tokenizer.json")
_ATTENTION = "sdpa"  # named, so that no configuration names one
_ADAPTER = "adapter_config.json"
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin")


class T5TextEncoder(nn.Module):
    """Encodes captions to embeddings; frozen, never in training mode.

    Args:
        transformer: The encoder stack with its weights.
        tokenizer: Its tokenizer.
        max_length: Tokens of every caption, the end token among them: longer ones are cut, shorter ones
            padded.
    """

    def __init__(
        self, *, transformer: T5EncoderModel, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        super().__init__()
        self.transformer = transformer.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        *,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> T5TextEncoder:
        """Reads an encoder from disk, each tensor straight into `dtype`; never from a network.

        Args:
            folder: A T5 folder (config.json, weights, spiece.model), a diffusers model with `text_encoder/`
                and `tokenizer/`, or such a `text_encoder/` itself.
            max_length: See the class.
            dtype: fp32 or bf16; T5 v1.1 overflows in fp16.
            device: Where it goes.

        Returns:
            The encoder.

        Raises:
            CheckpointError: The folder, a file in it or a weight is missing, damaged, or of another shape.
        """
        assert dtype in (torch.float32, torch.bfloat16), f"T5 in {dtype}: fp32 and bf16 only"
        weights_folder, tokenizer_folder = find_t5_folders(Path(folder))
        transformer = _read_transformer(weights_folder, dtype)
        tokenizer = _read_tokenizer(tokenizer_folder)
        return cls(transformer=transformer, tokenizer=tokenizer, max_length=max_length).to(device)

    def train(self, mode: bool = True) -> T5TextEncoder:
        """Stays in evaluation mode, whatever its parent module does: the encoder is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Encodes captions.

        Args:
            captions: Any text; the empty one is the null condition of some recipes.

        Returns:
            text_bld, (len(captions), max_length, d_model), in the encoder's dtype and on its device.
        """
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_tensors="pt",
        )
        output = self.transformer(input_ids=tokens["input_ids"].to(self.transformer.device))
        text_bld: Tensor = output.last_hidden_state
        return text_bld

    def token_length(self, caption: str) -> int:
        """Returns the number of tokens of a caption, including the end token; it is truncated above
        `max_length`.
        """
        return _count(self.tokenizer, caption)


def find_t5_folders(folder: Path) -> tuple[Path, Path]:
    """Finds the folders of weights and tokenizer below a path.

    Args:
        folder: As for `T5TextEncoder.from_folder`.

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
    tokenizer = next((f for f in places if any((f / name).is_file() for name in _TOKENIZER_FILES)), None)
    if tokenizer is None:
        raise CheckpointError(
            f"{folder} holds no T5 tokenizer",
            expected=f"{' or '.join(_TOKENIZER_FILES)} there or in tokenizer/ next to text_encoder/",
            remedy="copy the tokenizer's files of google/t5-v1_1-xxl into it",
        )
    return weights, tokenizer


def count_tokens(folder: Path, captions: Sequence[str]) -> list[int]:
    """Returns the number of tokens of each caption, including its end token, without loading the encoder.

    Args:
        folder: As for `T5TextEncoder.from_folder`.
        captions: Texts.

    Raises:
        CheckpointError: The folder has no tokenizer.
    """
    tokenizer = _read_tokenizer(find_t5_folders(folder)[1])
    return [_count(tokenizer, caption) for caption in captions]


def _count(tokenizer: PreTrainedTokenizerBase, caption: str) -> int:
    return len(tokenizer(caption, return_attention_mask=False)["input_ids"])


def _read_tokenizer(folder: Path) -> T5Tokenizer:
    check_tokenizer_files(folder)
    expected = "the tokenizer of google/t5-v1_1-xxl"
    try:
        with reading(f"the T5 tokenizer in {folder}", error=CheckpointError, expected=expected):
            tokenizer: T5Tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
            return tokenizer
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, which is no Exception
            raise
        raise CheckpointError(
            f"the T5 tokenizer in {folder} is damaged: {error}", expected=expected
        ) from error


def _read_transformer(folder: Path, dtype: torch.dtype) -> T5EncoderModel:
    """Reads the weights; unlike transformers itself, fails if a weight is missing."""
    config = read_config(folder)
    if (folder / _ADAPTER).exists():
        raise CheckpointError(
            f"{folder} holds {_ADAPTER}, which leads to other weights",
            expected="an encoder without adapters",
            remedy="take the file out of the folder",
        )
    transformer: T5EncoderModel
    report: dict[str, Any]
    bar_was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with reading(
            f"T5 weights in {folder} cannot be read",
            error=CheckpointError,
            expected="the complete files of a T5 v1.1 encoder",
            remedy="compare the file sizes with the source and copy damaged files again",
        ):
            transformer, report = T5EncoderModel.from_pretrained(  # type: ignore[misc]  # a pair, as asked
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=_ATTENTION,
                local_files_only=True,
                output_loading_info=True,
            )
    finally:
        if bar_was_on:
            transformers_logging.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"T5 weights in {folder} lack {len(missing)} tensors: {', '.join(missing[:8])}",
            expected="all weights that its config.json calls for",
            remedy="check that every shard of the index is there and that config.json belongs to the weights",
        )
    return transformer

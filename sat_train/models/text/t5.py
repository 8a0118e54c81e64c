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
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from sat_train.errors import CheckpointError
from sat_train.files import reading
from sat_train.models.text.t5_folder import (
    CONFIG,
    LEAST_BYTES_OF_A_WEIGHT,
    bytes_of_weights,
    check_tokenizer_files,
    find_t5_folders,
    read_settings,
)

_ATTENTION = "sdpa"  # named, so that no configuration names one
_ADAPTER = "adapter_config.json"


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
        tokenizer = read_tokenizer(tokenizer_folder)
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
        return len(self.tokenizer(caption, return_attention_mask=False)["input_ids"])


def read_tokenizer(folder: Path) -> T5Tokenizer:
    """Reads a tokenizer from its folder.

    Raises:
        CheckpointError: It is damaged.
    """
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


def _read_config(folder: Path) -> T5Config:
    """Returns the configuration of an encoder, after checking it against the size of the weights."""
    config = T5Config(**read_settings(folder), is_encoder_decoder=False, use_cache=False)
    held = bytes_of_weights(folder)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in T5EncoderModel(config).parameters())
    if count * LEAST_BYTES_OF_A_WEIGHT > held:
        raise CheckpointError(
            f"{folder / CONFIG} claims {count:,} weights, but the files next to it have {held:,} bytes",
            expected="all weights that it calls for, in at least 16 bits each",
            remedy="check that every shard is there and that config.json belongs to the weights",
        )
    return config


def _read_transformer(folder: Path, dtype: torch.dtype) -> T5EncoderModel:
    """Reads the weights; unlike transformers itself, fails if a weight is missing."""
    config = _read_config(folder)
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

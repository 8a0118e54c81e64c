"""Counts the tokens of captions with the tokenizer's own model, without transformers, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sat_train.errors import CheckpointError
from sat_train.files import reading
from sat_train.models.text.t5_folder import check_tokenizer_files, find_t5_folders

_MODEL = "spiece.model"


def count_tokens(folder: Path, captions: Sequence[str]) -> list[int]:
    """Returns the number of tokens of each caption, including its end token, without loading the encoder.

    Args:
        folder: As for `encoding.text_weights.read_text_encoder`.
        captions: Texts.

    Raises:
        CheckpointError: The folder has no tokenizer, or a damaged one.
    """
    tokenizer_folder = find_t5_folders(folder)[1]
    check_tokenizer_files(tokenizer_folder)
    model = tokenizer_folder / _MODEL
    if not model.is_file():
        from sat_train.models.text.t5 import read_tokenizer

        tokenizer = read_tokenizer(tokenizer_folder)
        return [len(tokenizer(caption)["input_ids"]) for caption in captions]
    from sentencepiece import SentencePieceProcessor

    with reading(model, error=CheckpointError, expected="the tokenizer of google/t5-v1_1-xxl"):
        pieces = SentencePieceProcessor(model_file=str(model))
        return [len(ids) + 1 for ids in pieces.encode(list(captions))]

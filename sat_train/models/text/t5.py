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

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5Tokenizer

from sat_train.errors import CheckpointError
from sat_train.files import reading
from sat_train.models.text.t5_encoder import T5Encoder
from sat_train.models.text.t5_folder import check_tokenizer_files


class T5TextEncoder(nn.Module):
    """Encodes captions to embeddings; frozen, never in training mode.

    Args:
        transformer: The encoder stack with its weights.
        tokenizer: Its tokenizer.
        max_length: Tokens of every caption, the end token among them: longer ones are cut, shorter ones
            padded.
    """

    def __init__(
        self, *, transformer: T5Encoder, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        super().__init__()
        self.transformer = transformer.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.max_length = max_length

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
        text_bld: Tensor = self.transformer(tokens["input_ids"].to(self.transformer.shared.weight.device))
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

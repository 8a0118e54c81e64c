"""The frozen T5 v1.1 encoder that CogVideoX was trained with.

Captions are padded to a fixed length and encoded WITHOUT an attention mask: padding is attended to, and its
outputs are part of what the transformer reads. That is how the released models were trained, in SAT and in
diffusers alike; a mask would change every embedding.

Source: THUDM/CogVideo@7a1af71 `sat/sgm/modules/encoders/modules.py` FrozenT5Embedder; diffusers 0.42
`pipeline_cogvideox.py` _get_t5_prompt_embeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sat_train.models.text.t5_encoder import T5Encoder
from sat_train.models.text.tokenizer import T5Tokenizer


class T5TextEncoder(nn.Module):
    """Encodes captions to embeddings; frozen, never in training mode.

    Args:
        transformer: The encoder stack with its weights.
        tokenizer: Its tokenizer.
        max_length: Tokens of every caption, the end token among them: longer ones are cut, shorter ones
            padded.
    """

    def __init__(self, *, transformer: T5Encoder, tokenizer: T5Tokenizer, max_length: int) -> None:
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
        ids = [self.tokenizer.encode_to_length(caption, self.max_length) for caption in captions]
        device = self.transformer.shared.weight.device
        text_bld: Tensor = self.transformer(torch.tensor(ids, device=device).view(-1, self.max_length))
        return text_bld

    def token_length(self, caption: str) -> int:
        """Returns the number of tokens of a caption, including the end token; it is truncated above
        `max_length`.
        """
        return len(self.tokenizer.encode(caption))

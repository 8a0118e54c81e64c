"""Captions: their embeddings, and the embedding that replaces a missing one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.distributed.transfer import to_device
from sat_train.encoding.cache.entries import CacheEntry, SampleFacts
from sat_train.encoding.cache.key import EncoderDigests, text_key
from sat_train.encoding.cache.shards import EntryInfo
from sat_train.encoding.conditions.condition import Condition, DitInputs, Encoding
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.models.encoders import Encoders


class TextCondition(Condition):
    """The caption.

    Args:
        null: Replacement of a missing caption, in training and in guidance: zeros, or the encoded empty
            prompt.
        empty_prompt: Returns the embedding of the empty prompt, (l, d).
        drop_probability: Share of the training samples whose caption is dropped (`ucg_rate`).
    """

    name = "text"
    tensors = frozenset({"text"})
    drop_purpose = "caption_drop"
    guides = True
    encodes_text = True

    def __init__(
        self,
        *,
        null: Literal["zero", "empty_prompt"],
        empty_prompt: Callable[[], Tensor],
        drop_probability: float = 0.0,
    ) -> None:
        self._null, self._empty_prompt = null, empty_prompt
        self.drop_probability = drop_probability

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Returns the embedding of the caption as `text`, (l, d)."""
        return {"text": encoders.text(sample.caption)}

    def entry(self, facts: SampleFacts) -> CacheEntry:
        """Returns the entry of the caption, which samples with the same caption share."""
        return text_entry(facts.caption, facts.encoder_digests)

    def drop(self, encoded: Encoding, dropped_b: Tensor) -> Encoding:
        """Replaces embeddings by the null embedding."""
        text = encoded["text"]
        null = torch.zeros_like(text)
        if self._null == "empty_prompt":
            null = to_device(self._empty_prompt(), text.device).to(text.dtype).expand_as(text)
        return {"text": torch.where(dropped_b[:, None, None], null, text)}

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Returns the embeddings."""
        return DitInputs(text_bld=encoded["text"])


def text_entry(caption: str, encoder_digests: EncoderDigests) -> CacheEntry:
    """Returns the cache entry of a caption's embedding."""
    text = encoder_digests.text
    return CacheEntry(text_key(caption, text=text), EntryInfo("text", caption, text))


def others_encode_text(conditions: Iterable[Condition]) -> bool:
    """Returns whether a condition other than the caption calls the text encoder."""
    return any(each.encodes_text for each in conditions if not isinstance(each, TextCondition))

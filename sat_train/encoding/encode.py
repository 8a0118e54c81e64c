"""Encodes samples as the cache keeps them: what the autoencoder and the text encoder give, before any draw.

A sample is encoded by itself, here as in training without a cache, and kept in the dtype the encoders compute
in, which loses nothing. So a loss from the cache has the bits of a loss without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sat_train.data.batch import CachedSample, VideoBatch, cat_cached
from sat_train.data.cache.key import EncoderDigests
from sat_train.data.cache.shards import EntryInfo, ShardWriter
from sat_train.encoding.encoders import Encoders, conditioning_image


@dataclass(frozen=True)
class _Part:
    """One of the encodings of a sample, not yet made."""

    key: str
    info: EntryInfo
    encode: Callable[[], dict[str, Tensor]]


class SampleEncoder:
    """Encodes batches and hands what is new to the writer.

    Args:
        encoders: The encoders.
        writer: Gets the entries.
        encoder_digests: What the encoders are.
        is_there: Whether an entry is in the cache already.
        image: The image condition: None for text-to-video, `noised` in training, `plain` in validation.
    """

    def __init__(
        self,
        encoders: Encoders,
        *,
        writer: ShardWriter,
        encoder_digests: EncoderDigests,
        is_there: Callable[[str], bool],
        image: Literal["noised", "plain"] | None,
    ) -> None:
        self._encoders, self._writer, self._encoder_digests = encoders, writer, encoder_digests
        self._is_there, self._image = is_there, image

    def complete(self, batch: VideoBatch) -> VideoBatch:
        """Returns a batch with its encodings in place of its pixels, and keeps those that are new."""
        if batch.cached is not None:
            return batch
        samples = [self._complete(batch, row) for row in range(len(batch))]
        return replace(batch, video_btchw=None, image_bchw=None, cached=cat_cached(samples))

    def keep(self, batch: VideoBatch) -> int:
        """Encodes what is new in a batch, captions aside, and keeps it; returns how many entries it was."""
        parts = [part for row in range(len(batch)) for part in self._of_pixels(batch, row)]
        new = [part for part in parts if self._is_new(part.key)]
        for part in new:
            self._writer.add(part.key, part.encode(), part.info)
        return len(new)

    def keep_text(self, key: str, caption: str) -> None:
        """Encodes one caption and keeps it."""
        part = self._of_text(key, caption)
        self._writer.add(key, part.encode(), part.info)

    def _complete(self, batch: VideoBatch, row: int) -> CachedSample:
        text = self._of_text(batch.keys[row].text, batch.captions[row])
        made = {part.info.kind: part.encode() for part in (*self._of_pixels(batch, row), text)}
        for part in (*self._of_pixels(batch, row), text):
            if self._is_new(part.key):
                self._writer.add(part.key, made[part.info.kind], part.info)
        image = made.get("image", {})
        encodings = CachedSample(
            mean_btchw=made["clip"]["mean"],
            logvar_btchw=made["clip"]["logvar"],
            text_bld=made["text"]["text"],
            image_latent_btchw=image.get("mean"),
            image_logvar_btchw=image.get("logvar"),
        )
        return encodings.unsqueezed()

    def _is_new(self, key: str) -> bool:
        return key not in self._writer and not self._is_there(key)

    def _of_pixels(self, batch: VideoBatch, row: int) -> list[_Part]:
        keys, name, vae = batch.keys[row], batch.clip_ids[row], self._encoder_digests.vae
        info = EntryInfo("clip", name, vae, keys.clip_origin)
        parts = [_Part(keys.clip, info, lambda: self._clip(batch, row))]
        if keys.image is not None:
            info = EntryInfo("image", name, vae, keys.image_origin)
            parts.append(_Part(keys.image, info, lambda: self._condition(batch, row)))
        return parts

    def _of_text(self, key: str, caption: str) -> _Part:
        info = EntryInfo("text", caption, self._encoder_digests.text)
        return _Part(key, info, lambda: {"text": self._encoders.text([caption])[0]})

    def _clip(self, batch: VideoBatch, row: int) -> dict[str, Tensor]:
        assert batch.video_btchw is not None, "a batch has pixels or encodings"
        pixels = batch.video_btchw[row : row + 1]
        return self._moments(self._encoders.video_moments(pixels, subject=batch.clip_ids[row]))

    def _condition(self, batch: VideoBatch, row: int) -> dict[str, Tensor]:
        augmentations = batch.augmentations if self._image == "noised" else ()
        image = conditioning_image(batch, augmentations, self._encoders.device)
        return self._moments(self._encoders.image_moments(image[row : row + 1]))

    def _moments(self, moments: Sequence[Tensor]) -> dict[str, Tensor]:
        dtype = self._encoders.vae_dtype
        kept = [tensor[0].to(dtype) for tensor in moments]
        for tensor, exact in zip(kept, moments, strict=True):
            assert torch.equal(tensor.to(exact.dtype), exact[0]), f"moments do not fit {dtype}"
        return dict(zip(("mean", "logvar"), kept, strict=True))

"""The cache as the data set sees it: from a clip, its window and its caption to their encodings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from sat_train.data.batch import CachedSample
from sat_train.data.cache.files import FileBook
from sat_train.data.cache.index import CacheIndex
from sat_train.data.cache.key import EncoderDigests, SampleKeys, clip_key, image_key, text_key
from sat_train.data.failures import BadClip
from sat_train.data.sources.records import ClipRecord
from sat_train.data.view import View
from sat_train.data.window import Window
from sat_train.errors import DataError

Use = Literal["read", "require", "write"]
Condition = Literal["noised", "plain"]


@dataclass(frozen=True)
class OpenCache:
    """A cache folder as one process has it open.

    Args:
        folder: The folder.
        index: What it holds.
        book: What is known of the files.
        encoders: What the encoders are.
        use: `require`: what is missing is an error. `read`: it is not. `write`: nothing is read, samples get
            their keys only.
    """

    folder: Path
    index: CacheIndex
    book: FileBook
    encoders: EncoderDigests
    use: Use


class SampleCache:
    """Makes the keys of samples and reads what is there.

    Args:
        cache: The open folder.
        fps: Frames a second of a sample.
        max_upscale: Largest factor by which a picture may be enlarged.
        image: The image condition: None for text-to-video, `noised` in training, `plain` in validation.
    """

    def __init__(
        self,
        cache: OpenCache,
        *,
        fps: float,
        max_upscale: float,
        image: Condition | None,
    ) -> None:
        self.index, self.book, self.encoders = cache.index, cache.book, cache.encoders
        self.use, self.image = cache.use, image
        self._fps, self._max_upscale = fps, max_upscale

    def keys(
        self, record: ClipRecord, caption: str, window: Window, view: View, crop: str, size: tuple[int, int]
    ) -> SampleKeys:
        """Returns the keys of a sample.

        Args:
            record: Its clip.
            caption: Its caption.
            window: Its moments.
            view: What is random about its pixels.
            crop: Which part of the picture is kept.
            size: Its height and width.

        Raises:
            BadClip: The clip or its image is missing or unreadable.
        """
        origin = image_origin = self.book.origin(record.path, record.span)
        random = (view.seed, view.number)
        shape = {"size": size, "max_upscale": self._max_upscale}
        clip = pixels = clip_key(
            identity=origin.identity,
            start=window.start,
            count=window.count,
            total=window.total,
            fps=self._fps,
            crop=(crop, *random) if crop == "random" else (crop,),
            vae=self.encoders.vae,
            **shape,
        )
        if self.image is not None and record.image is not None:
            image_origin = self.book.origin(record.image)
            pixels = clip_key(
                identity=image_origin.identity,
                start=0.0,
                count=1,
                total=1,
                fps=0.0,
                crop=(crop, *random) if crop == "random" else (crop,),
                vae=self.encoders.vae,
                **shape,
            )
        noise = random if self.image == "noised" else None
        return SampleKeys(
            clip=clip,
            text=text_key(caption, text=self.encoders.text),
            image=None
            if self.image is None
            else image_key(pixels=pixels, noise=noise, vae=self.encoders.vae),
            clip_origin=origin,
            image_origin=image_origin,
        )

    def read(self, keys: SampleKeys, clip_id: str) -> CachedSample | None:
        """Returns the encodings of a sample, as a batch of one; None where one of them is missing.

        Raises:
            BadClip: The clip is known to be undecodable.
            DataError: Something is missing under `require`.
        """
        if self.use == "write":
            return None
        missing = self.missing(keys)
        if missing:
            known = self.index.failure(keys.clip)
            if known is not None:
                raise BadClip(*known)
            if self.use == "require":
                raise _not_there(clip_id, missing)
            return None
        clip, text = self._tensors(keys.clip), self._tensors(keys.text)
        image = {} if keys.image is None else self._tensors(keys.image)
        return CachedSample(
            mean_btchw=clip["mean"],
            logvar_btchw=clip["logvar"],
            text_bld=text["text"],
            image_latent_btchw=image.get("mean"),
            image_logvar_btchw=image.get("logvar"),
        ).unsqueezed()

    def missing(self, keys: SampleKeys) -> tuple[str, ...]:
        """Returns which of a sample's encodings are not there: `clip`, `text`, `image`."""
        named = {"clip": keys.clip, "text": keys.text, "image": keys.image}
        return tuple(name for name, key in named.items() if key is not None and key not in self.index)

    def _tensors(self, key: str) -> dict[str, Tensor]:
        tensors = self.index.read(key)
        assert tensors is not None, f"{key} was there a moment ago"
        return tensors


def _not_there(clip_id: str, missing: tuple[str, ...]) -> DataError:
    return DataError(
        f"{clip_id}: {' and '.join(missing)} not in the cache, with data.cache = require",
        expected="every sample encoded with these files, settings and encoders",
        remedy="torchrun launch/precompute.py with the same --base, or data.cache=fill",
    )

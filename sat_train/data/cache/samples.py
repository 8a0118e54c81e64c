"""The cache as the data set sees it: from a clip, its window and its caption to their encodings."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from sat_train.data.augmentation_key import AugmentationKey
from sat_train.data.bad_clips import PASSING_CAUSES, BadClip
from sat_train.data.batch import CachedSample
from sat_train.data.cache.file_metadata import FileMetadata
from sat_train.data.cache.index import CacheIndex
from sat_train.data.cache.key import EncoderDigests, SampleKeys, clip_key, image_key, text_key
from sat_train.data.sources.records import ClipRecord
from sat_train.data.window import Window
from sat_train.errors import DataError

Use = Literal["read", "require", "write"]
Condition = Literal["noised", "plain"]
_TENSORS = {"clip": {"mean", "logvar"}, "image": {"mean", "logvar"}, "text": {"text"}}


@dataclass(frozen=True)
class OpenCache:
    """A cache folder as one process has it open.

    Args:
        folder: The folder.
        index: What it holds.
        file_metadata: What is known of the files.
        encoder_digests: What the encoders are.
        use: `require`: what is missing is an error. `read`: it is not. `write`: nothing is read, samples get
            their keys only.
    """

    folder: Path
    index: CacheIndex
    file_metadata: FileMetadata
    encoder_digests: EncoderDigests
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
        self.index, self.file_metadata, self.encoder_digests = (
            cache.index,
            cache.file_metadata,
            cache.encoder_digests,
        )
        self.use, self.image = cache.use, image
        self._fps, self._max_upscale = fps, max_upscale

    def keys(
        self,
        record: ClipRecord,
        caption: str,
        window: Window,
        augmentation: AugmentationKey,
        crop: str,
        size: tuple[int, int],
    ) -> SampleKeys:
        """Returns the keys of a sample.

        Args:
            record: Its clip.
            caption: Its caption.
            window: Its moments.
            augmentation: What is random about its pixels.
            crop: Which part of the picture is kept.
            size: Its height and width.

        Raises:
            BadClip: The clip or its image is missing or unreadable.
        """
        origin = image_origin = self.file_metadata.origin(record.path, record.span)
        random = (augmentation.seed, augmentation.number)
        make_key = functools.partial(
            clip_key,
            size=size,
            max_upscale=self._max_upscale,
            crop=(crop, *random) if crop == "random" else (crop,),
            vae=self.encoder_digests.vae,
        )
        clip = pixels = make_key(
            identity=origin.identity,
            start=window.start,
            count=window.count,
            total=window.total,
            fps=self._fps,
        )
        if self.image is not None and record.image is not None:
            image_origin = self.file_metadata.origin(record.image)
            pixels = make_key(identity=image_origin.identity, start=0.0, count=1, total=1, fps=0.0)
        noise = random if self.image == "noised" else None
        return SampleKeys(
            clip=clip,
            text=text_key(caption, text=self.encoder_digests.text),
            image=None
            if self.image is None
            else image_key(pixels=pixels, noise=noise, vae=self.encoder_digests.vae),
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
        found = None if self.missing(keys) else self._read_parts(keys)
        if found is None:
            known = self.known_failure(keys)
            if known is not None:
                raise known
            if self.use == "require":
                raise self._not_there(keys, clip_id)
            return None
        clip, text, image = found["clip"], found["text"], found.get("image", {})
        return CachedSample(
            mean_btchw=clip["mean"],
            logvar_btchw=clip["logvar"],
            text_bld=text["text"],
            image_latent_btchw=image.get("mean"),
            image_logvar_btchw=image.get("logvar"),
        ).unsqueezed()

    def known_failure(self, keys: SampleKeys) -> BadClip | None:
        """Returns why a clip is known to be undecodable.

        What may have passed since, a timeout for one, counts under `require` only.
        """
        known = self.index.failure(keys.clip)
        if known is None or (known[0] in PASSING_CAUSES and self.use != "require"):
            return None
        return BadClip(*known)

    def missing(self, keys: SampleKeys) -> tuple[str, ...]:
        """Returns which of a sample's encodings are not there: `clip`, `text`, `image`."""
        return tuple(name for name, key in _named(keys).items() if key not in self.index)

    def _read_parts(self, keys: SampleKeys) -> dict[str, dict[str, Tensor]] | None:
        """Returns the tensors of each part of a sample; None where one of them is missing or damaged."""
        found = {}
        for name, key in _named(keys).items():
            tensors = self.index.read(key)
            if tensors is not None and tensors.keys() != _TENSORS[name]:
                self.index.drop(key, f"holds {', '.join(sorted(tensors)) or 'nothing'}")
                tensors = None
            if tensors is None:
                return None
            found[name] = tensors
        return found

    def _not_there(self, keys: SampleKeys, clip_id: str) -> DataError:
        faults = [fault for key in _named(keys).values() if (fault := self.index.fault(key))]
        if faults:
            return DataError(
                "\n  ".join([f"{clip_id}: damaged in the cache, with data.cache = require", *faults]),
                expected="every entry as it was written",
                remedy="`sat-train cache prune --damaged` removes it; then precompute, or data.cache=fill",
            )
        return DataError(
            f"{clip_id}: {' and '.join(self.missing(keys))} not in the cache, with data.cache = require",
            expected="every sample encoded with these files, settings and encoders",
            remedy="torchrun launch/precompute.py with the same --base, or data.cache=fill",
        )


def _named(keys: SampleKeys) -> dict[str, str]:
    named = {"clip": keys.clip, "text": keys.text}
    return named if keys.image is None else {**named, "image": keys.image}

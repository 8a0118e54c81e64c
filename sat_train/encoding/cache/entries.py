"""Cache entries of a sample: one key per encoding, a hash of all its inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat_train.data.dataset import VideoDataset
from sat_train.data.sampler import ClipRef
from sat_train.data.window import Window
from sat_train.encoding.cache.index import OpenCache
from sat_train.encoding.cache.key import Origin, clip_key
from sat_train.encoding.cache.shards import EntryInfo


@dataclass(frozen=True)
class CacheEntry:
    """One encoding of a sample.

    Args:
        key: Its key in the cache.
        info: Its description.
    """

    key: str
    info: EntryInfo


SampleEntries = dict[str, CacheEntry]  # by the name of the encoding: `clip`, and that of each condition


class SampleFacts:
    """All inputs that the encodings of a sample may depend on.

    Args:
        videos: Its data set.
        cache: Holds the identity of files and encoders.
        index: Its global index.
        ref: Its clip.

    Attributes:
        record: Its clip, with the files next to it.
        caption: Its caption.
        window: Its moments.
        view: Seed and number of the random choices about its pixels.
        training: Its conditions are augmented.

    Raises:
        BadClip: The clip is missing, unreadable, or too short.
    """

    def __init__(self, videos: VideoDataset, cache: OpenCache, index: int, ref: ClipRef) -> None:
        self.encoder_digests, self._file_metadata = cache.encoder_digests, cache.file_metadata
        self.record, self.caption = videos.record(ref), videos.caption(index, ref)
        info = self._file_metadata.info(self.record.path, self.record.span)
        self.window = videos.clip_window(index, ref, info)
        augmentation, shape = videos.augmentation_key(index, ref), videos.shape(index)
        self.view, self.training = (augmentation.seed, augmentation.number), videos.training
        self._fps = videos.spec.fps
        self._picture: dict[str, Any] = {
            "size": (shape.height, shape.width),
            "max_upscale": videos.spec.max_upscale,
        }

    @functools.cached_property
    def clip(self) -> CacheEntry:
        """Entry of the clip's moments.

        Raises:
            BadClip: It is missing or unreadable.
        """
        origin = self._file_metadata.origin(self.record.path, self.record.span)
        return self._moments(origin, self.window, self._fps)

    def picture(self, path: Path) -> CacheEntry:
        """Returns the entry of a picture next to the clip, as if it were a clip, with the clip's crop.

        Raises:
            BadClip: It is missing or unreadable.
        """
        return self._moments(self._file_metadata.origin(path), Window(0.0, 1, 1), 0.0)

    def _moments(self, origin: Origin, window: Window, fps: float) -> CacheEntry:
        key = clip_key(
            identity=origin.identity,
            start=window.start,
            count=window.count,
            total=window.total,
            fps=fps,
            **self._picture,
            vae=self.encoder_digests.vae,
        )
        return CacheEntry(key, EntryInfo("clip", self.record.clip_id, self.encoder_digests.vae, origin))

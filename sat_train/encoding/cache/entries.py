"""Cache entries of a sample: one key per encoding, a hash of all its inputs."""

from __future__ import annotations

import functools
import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat_train.config.parts.field_parts import FieldParams
from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.dataset import VideoDataset
from sat_train.data.fields.reader import FieldReader, naming_field
from sat_train.data.sampler import ClipRef
from sat_train.data.window import Window
from sat_train.encoding.cache.index import OpenCache
from sat_train.encoding.cache.key import Origin, clip_key, field_key
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
        self._fps, self._fields = videos.spec.fps, videos.fields
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

    def field(self, name: str) -> str:
        """Returns a digest of all inputs of a field of the sample: settings, files, window and geometry.

        Raises:
            BadClip: One of its files, or the clip, is missing or unreadable.
        """
        reader, place = self._fields[name], self.record.fields.get(name)
        with naming_field(name, place):
            if place is None:
                raise BadClip("missing", "the source has none")
            files = [self._file_metadata.origin(file.path, file.span).identity for file in place.files]
        params: FieldParams = reader.params
        window = self.window
        clip = self._file_metadata.origin(self.record.path, self.record.span).identity
        return field_key(
            settings=params.model_dump(mode="json", exclude={"column"}),
            source=_source_of(type(reader)),
            files=files,
            value=place.value,
            clip=clip if params.timed or params.framed else None,
            window=[window.start, window.count, window.total, self._fps, place.begins]
            if params.timed
            else None,
            picture=self._picture if params.framed else None,
        )

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


def _source_of(kind: type[FieldReader]) -> str:
    """Returns the SHA-256 of the file of a kind of fields; empty for the package's, which have a version."""
    return "" if kind.__module__.startswith("sat_train.") else _hash_file(inspect.getfile(kind))


@functools.cache
def _hash_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()

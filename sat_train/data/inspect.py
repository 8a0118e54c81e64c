"""Inspects every clip of a set once and reports what it holds."""

from __future__ import annotations

import hashlib
import io
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from sat_train.config.values import show_duration
from sat_train.data.buckets import SampleSpec
from sat_train.data.clip_pool import look_into_clips
from sat_train.data.clips.bad_clip import BadClip, one_clip
from sat_train.data.clips.clip_file import ClipInfo, open_part
from sat_train.data.clips.frames import FrameReader, open_frames
from sat_train.data.clips.resize import CoverCrop, cover_crop
from sat_train.data.dataset import naming_image
from sat_train.data.fields.reader import FieldReader, SampleGeometry, naming_field, read_fields
from sat_train.data.sources.records import ClipRecord, name_some
from sat_train.data.window import count_windows, split_chunks, usable_part

MAX_WINDOWS = 8  # windows to decode per clip by default
_MANY_WINDOWS = 1000  # for the timeout of a clip when all of its windows are decoded
_THUMBNAIL_HEIGHT = 90
_SAMPLED_BYTES = 1 << 16


@dataclass(frozen=True)
class ClipFacts:
    """Facts about one inspected clip.

    Args:
        record: The clip.
        info: Its headers; None if they cannot be read.
        bucket: Index of its samples' shape; None if it cannot be used.
        windows: Number of windows that share no frame; 0 if it cannot be used.
        decoded: Number of windows of which every frame was decoded.
        problem: Reason why it cannot be used; None if it can.
        content_key: Key of its contents: size, beginning and end of the file.
        thumbnail: Its middle frame as a JPEG file; empty if there is none.
        fields: A few words about each of its fields.
        bad_field: The field for which it cannot be used; empty if it is not for a field.
    """

    record: ClipRecord
    info: ClipInfo | None = None
    bucket: int | None = None
    windows: int = 0
    decoded: int = 0
    problem: BadClip | None = None
    content_key: str = ""
    thumbnail: bytes = b""
    fields: Mapping[str, str] = field(default_factory=dict)
    bad_field: str = ""


def inspect_clips(
    records: Sequence[ClipRecord],
    spec: SampleSpec,
    readers: Mapping[str, FieldReader] | None = None,
    *,
    num_processes: int,
    max_windows: int | None = MAX_WINDOWS,
    timeout_s: float | None = None,
    on_clip: Callable[[], None] = lambda: None,
) -> list[ClipFacts]:
    """Reads headers, windows, fields and images of clips with the functions that training uses.

    Args:
        records: The clips.
        spec: Shape and rate of the samples.
        readers: Readers of the fields, by name.
        num_processes: Clips to read in parallel.
        max_windows: Windows to decode per clip, spread over it; None: all.
        timeout_s: Time after which a window is abandoned.
        on_clip: Called after each clip.
    """
    results = look_into_clips(
        records,
        lambda record: Inspection(record, spec, max_windows, timeout_s, readers or {}).run(),
        num_processes=num_processes,
        timeout_s=timeout_s and timeout_s * ((max_windows or _MANY_WINDOWS) + 2),
        on_clip=on_clip,
    )
    return [
        ClipFacts(record, problem=facts) if isinstance(facts, BadClip) else facts
        for record, facts in zip(records, results, strict=True)
    ]


class Inspection:
    """Inspection of one clip; keeps what is known so far if the next step fails.

    Args:
        record: The clip.
        spec: Shape and rate of the samples.
        max_windows: Windows to decode; None: all.
        timeout_s: Time limit of one window.
        readers: Readers of the fields, by name.
    """

    def __init__(
        self,
        record: ClipRecord,
        spec: SampleSpec,
        max_windows: int | None,
        timeout_s: float | None,
        readers: Mapping[str, FieldReader],
    ) -> None:
        self._spec, self._max_windows = spec, max_windows
        self._timeout_s, self._readers = timeout_s, readers
        self._facts = ClipFacts(record)

    def run(self) -> ClipFacts:
        """Runs the inspection and returns the facts."""
        try:
            with one_clip():
                self._look()
                self._describe_fields()
                self._read_windows()
                self._read_image()
        except BadClip as error:
            self._learn(problem=error, bucket=None, windows=0)
        if self._facts.info is not None:  # opening a pipe would block
            self._learn(content_key=_content_key(self._facts.record))
        return self._facts

    def _learn(self, **facts: Any) -> None:
        self._facts = replace(self._facts, **facts)

    def _look(self) -> None:
        """Reads headers and the middle frame, and finds the shape of the clip's samples.

        Raises:
            BadClip: It cannot be read, or training would leave it out or refuse it.
        """
        record, spec = self._facts.record, self._spec
        with self._open() as reader:
            self._learn(info=reader.info)
            first, last = usable_part(reader.info, record, spec.skip_frms_num)
            available = spec.available(reader.info, record)
            if not available:
                raise BadClip("short", "it gives no frame")
            size, thumbnail = _thumbnail(reader, (first + last) / 2)
        info = replace(reader.info, is_turned=size != (reader.info.height, reader.info.width))
        self._learn(info=info, thumbnail=thumbnail)
        bucket = spec.bucket(info, record)
        self._crop(bucket, info.shown_size)
        self._learn(bucket=bucket, windows=count_windows(available, spec.shapes[bucket].frames))

    def _read_windows(self) -> None:
        """Decodes the frames of windows from the beginning of the clip to its end.

        Raises:
            BadClip: One of them does not give its frames.
        """
        facts, spec = self._facts, self._spec
        assert facts.info is not None, "the clip has not been inspected"
        assert facts.bucket is not None, "the clip has not been inspected"
        first, last = usable_part(facts.info, facts.record, spec.skip_frms_num)
        frames = min(spec.shapes[facts.bucket].frames, spec.available(facts.info, facts.record))
        parts = split_chunks(first=first, last=last, count=facts.windows)
        total = spec.shapes[facts.bucket].frames
        crop = self._crop(facts.bucket, facts.info.shown_size)
        for number, part in enumerate(_spread_over(parts, self._max_windows), 1):
            deadline = self._timeout_s and time.monotonic() + self._timeout_s
            with self._open() as reader:
                times = reader.read([part[0] + i / spec.fps for i in range(frames)], _small).times
                self._read_fields(
                    SampleGeometry(times, total, crop, spec.max_upscale, reader.number_at, deadline)
                )
            self._learn(decoded=number)

    def _describe_fields(self) -> None:
        """Finds out what the fields are.

        Raises:
            BadClip: One cannot be read.
        """
        record = self._facts.record
        for name, place in record.fields.items():
            with self._blaming(name), naming_field(name, place):
                about = self._readers[name].describe(place)
            self._learn(fields={**self._facts.fields, name: about})

    def _read_fields(self, geometry: SampleGeometry) -> None:
        """Reads the fields of a window.

        Raises:
            BadClip: One of them does not give its value.
        """
        for name, reader in self._readers.items():
            with self._blaming(name):
                read_fields({name: reader}, self._facts.record.fields, geometry)

    @contextmanager
    def _blaming(self, name: str) -> Iterator[None]:
        """Remembers the field for which the clip cannot be used."""
        try:
            yield
        except BadClip:
            self._learn(bad_field=name)
            raise

    def _read_image(self) -> None:
        """Reads the image that conditions the clip, if the model takes one.

        Raises:
            BadClip: Training would refuse it.
        """
        record, bucket = self._facts.record, self._facts.bucket
        if not self._spec.images or record.image is None:
            return
        assert bucket is not None, "the clip has not been inspected"
        with naming_image(record.image), open_frames(record.image, timeout_s=self._timeout_s) as reader:
            reader.read([reader.info.first], lambda *size: self._crop(bucket, size))

    def _open(self) -> AbstractContextManager[FrameReader]:
        record = self._facts.record
        return open_frames(record.path, span=record.span, timeout_s=self._timeout_s)

    def _crop(self, bucket: int, size: tuple[int, int]) -> CoverCrop:
        shape = self._spec.shapes[bucket]
        target = (shape.height, shape.width)
        return cover_crop(source=size, target=target, max_upscale=self._spec.max_upscale)


def _spread_over(parts: Sequence[tuple[float, float]], limit: int | None) -> list[tuple[float, float]]:
    """Returns at most a number of items at equal distances, the first and the last among them."""
    if limit is None or len(parts) <= limit:
        return list(parts)
    return [parts[round(i * (len(parts) - 1) / max(1, limit - 1))] for i in range(limit)]


def _small(height: int, width: int) -> CoverCrop:
    """Crops a thumbnail: the whole picture, unless it is very long or tall."""
    thumbnail_width = min(max(1, round(width * _THUMBNAIL_HEIGHT / height)), 4 * _THUMBNAIL_HEIGHT)
    return cover_crop(
        source=(height, width), target=(_THUMBNAIL_HEIGHT, thumbnail_width), max_upscale=math.inf
    )


def _thumbnail(reader: FrameReader, moment: float) -> tuple[tuple[int, int], bytes]:
    """Returns a clip's height and width as shown, and the frame at a time as a small JPEG file."""
    sizes: list[tuple[int, int]] = []

    def choose_crop(height: int, width: int) -> CoverCrop:
        sizes.append((height, width))
        return _small(height, width)

    picture = reader.read([moment], choose_crop).video_thwc[0]
    return sizes[0], _jpeg(picture)


def _jpeg(picture_hwc: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture_hwc).save(file, "JPEG", quality=80)
    return file.getvalue()


def _content_key(record: ClipRecord) -> str:
    try:
        with open_part(record.path, record.span, block_bytes=_SAMPLED_BYTES) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            head = file.read(min(size, _SAMPLED_BYTES))
            file.seek(max(0, size - _SAMPLED_BYTES))
            tail = file.read(min(size, _SAMPLED_BYTES))
    except (OSError, BadClip):
        return ""
    part = f"{size} {record.start} {record.end}".encode()
    return hashlib.sha256(part + head + tail).hexdigest()[:16]


@dataclass(frozen=True)
class SetReport:
    """Report on a set of clips.

    Args:
        name: The set.
        fingerprint: See `ClipSource`.
        ignored: Files that are not clips, by suffix.
        spec: Shape and rate of the samples.
        clips: Facts about every clip.
        long_captions: Captions that the text encoder truncates, with their tokens; None: not counted.
        max_tokens: Largest number of tokens for the text encoder.
        notes: Notes on the files; see `ClipSource`.
        tokenizer: The text encoder's folder, with the tokenizer.
        fields: Kinds of the fields, by name.
    """

    name: str
    fingerprint: str
    ignored: tuple[tuple[str, int], ...]
    spec: SampleSpec
    clips: tuple[ClipFacts, ...]
    long_captions: tuple[tuple[str, int], ...] | None
    max_tokens: int
    notes: tuple[str, ...] = ()
    tokenizer: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)

    def readable(self) -> list[ClipFacts]:
        return [clip for clip in self.clips if clip.info is not None]

    def problems(self) -> dict[str, list[ClipFacts]]:
        """Returns the unusable clips by cause, the most frequent first."""
        by_cause: dict[str, list[ClipFacts]] = {}
        for clip in self.clips:
            if clip.problem is not None:
                by_cause.setdefault(clip.problem.cause, []).append(clip)
        return dict(sorted(by_cause.items(), key=lambda item: -len(item[1])))

    def duplicates(self) -> list[list[ClipFacts]]:
        """Returns groups of clips with the same content."""
        groups: dict[str, list[ClipFacts]] = {}
        for clip in self.clips:
            if clip.content_key:
                groups.setdefault(clip.content_key, []).append(clip)
        return [group for group in groups.values() if len(group) > 1]

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yields the lines of the report, as names and values."""
        infos = [clip.info for clip in self.readable() if clip.info is not None]
        words = [len(caption.split()) for clip in self.clips for caption in clip.record.captions]
        usable = len(self.clips) - sum(map(len, self.problems().values()))
        yield "set", f"{self.name} (fingerprint {self.fingerprint})"
        counts = Counter(clip.bucket for clip in self.clips)
        empty = sum(bucket not in counts for bucket in range(len(self.spec.shapes)))
        others = f" ({empty} other shapes have no clip)" if empty else ""
        yield "samples", f"{self.spec.fps:g} frames a second; frames x height x width{others}:"
        for bucket, shape in enumerate(self.spec.shapes):
            if bucket in counts:
                yield f"  {shape}", f"{counts[bucket]} clips"
        yield "clips", f"{len(self.clips)}, of which {usable} usable"
        if infos:
            durations = [info.duration for info in infos]
            yield "length", f"{show_duration(sum(durations))} in all; {_spread(durations, 's')} each"
            windows = sum(clip.windows for clip in self.clips)
            decoded = sum(clip.decoded for clip in self.clips)
            yield "windows", f"{windows} of a sample's length that share no frame; {decoded} were decoded"
            yield "rates", _most(Counter(f"{info.rate:.3f}".rstrip("0").rstrip(".") for info in infos))
            yield "sizes", _most(Counter(f"{info.height}x{info.width}" for info in infos))
            yield "codecs", _most(Counter(info.codec for info in infos))
        yield "captions", f"{_spread(words, ' words')} each; {len(words) - self._distinct()} repeated"
        if self.long_captions is not None:
            whose = f" of the text encoder in {self.tokenizer}" if self.tokenizer else ""
            yield (
                "long captions",
                f"{len(self.long_captions)} have more than the {self.max_tokens} tokens{whose}",
            )
        for name, kind in self.fields.items():
            yield f"field {name}", self._about_field(name, kind)
        for cause, clips in self.problems().items():
            yield cause, f"{len(clips)}: {', '.join(clip.record.clip_id for clip in clips[:5])}"
        repeated = self.duplicates()
        if repeated:
            first = ", ".join(clip.record.clip_id for clip in repeated[0][:3])
            yield "duplicates", f"{sum(map(len, repeated)) - len(repeated)} clips, such as {first}"
        if self.ignored:
            yield "not clips", ", ".join(f"{count} {suffix}" for suffix, count in self.ignored)
        for note in self.notes:
            yield "note", note

    def _about_field(self, name: str, kind: str) -> str:
        """Counts what the clips have under a field, and names those that cannot be used for it."""
        found = Counter(clip.fields[name] for clip in self.clips if name in clip.fields)
        bad = [clip for clip in self.clips if clip.bad_field == name]
        faults = (f"{clip.record.clip_id} ({clip.problem})" for clip in bad)
        about = f"{kind}: {_most(found) or 'none can be read'}"
        return f"{about}; {len(bad)} clips fail for it: {name_some(faults, limit=5)}" if bad else about

    def _distinct(self) -> int:
        return len({caption for clip in self.clips for caption in clip.record.captions})


def _spread(values: Sequence[float], unit: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{low:.4g} to {high:.4g}{unit}, median {middle:.4g}"


def _most(counts: Counter[str]) -> str:
    return name_some((f"{name} ({count})" for name, count in counts.most_common()), limit=6)

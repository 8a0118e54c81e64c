"""Looks at every clip of a set once and says what it holds."""

from __future__ import annotations

import hashlib
import io
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from sat_train.data.clip_file import ClipInfo, open_clip, open_part
from sat_train.data.clip_pool import look_into_clips
from sat_train.data.dataset import usable_part
from sat_train.data.failures import BadClip
from sat_train.data.frames import FrameReader
from sat_train.data.plan import Fit
from sat_train.data.resize import CoverCrop, plan_cover_crop
from sat_train.data.sources.records import ClipRecord

_THUMBNAIL_HEIGHT = 90
_SAMPLED_BYTES = 1 << 16


@dataclass(frozen=True)
class ClipFacts:
    """What was found out about one clip.

    Args:
        record: The clip.
        info: Its headers; None when these cannot be read.
        available: Frames that it can give at the wanted rate.
        bucket: Which of the shapes its samples have; None when it cannot be used.
        problem: Why it cannot be used; None: it can.
        content_key: The same for files of the same content: their size, beginning and end.
        thumbnail: Its middle frame as a JPEG file; empty when there is none.
    """

    record: ClipRecord
    info: ClipInfo | None
    available: int
    bucket: int | None
    problem: BadClip | None
    content_key: str
    thumbnail: bytes


def inspect_clips(
    records: Sequence[ClipRecord],
    fit: Fit,
    *,
    num_processes: int,
    timeout_s: float | None = None,
    on_clip: Callable[[], None] = lambda: None,
) -> list[ClipFacts]:
    """Reads headers and the middle frame of each clip.

    Args:
        records: Clips.
        fit: What samples are to be.
        num_processes: Clips that are read at once.
        timeout_s: A clip that takes longer is given up.
        on_clip: Called after each one.
    """
    found = look_into_clips(
        records,
        lambda record: _inspect(record, fit, timeout_s),
        num_processes=num_processes,
        timeout_s=timeout_s,
        on_clip=on_clip,
    )
    return [
        ClipFacts(record, None, 0, None, facts, "", b"") if isinstance(facts, BadClip) else facts
        for record, facts in zip(records, found, strict=True)
    ]


def _inspect(record: ClipRecord, fit: Fit, timeout_s: float | None) -> ClipFacts:
    info, available, bucket, problem, thumbnail = None, 0, None, None, b""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        with open_clip(record.path, span=record.span, timeout_s=timeout_s) as (container, stream):
            reader = FrameReader(container, stream, deadline=deadline)
            info = reader.info
            first, last = usable_part(info, record, fit.skip_frms_num)
            available = fit.available(info, record)
            if not available:
                raise BadClip("short", "it gives no frame")
            shown, thumbnail = _look(reader, (first + last) / 2)
            info = replace(info, quarter_turns=int(shown != (info.height, info.width)))
            bucket = _bucket(fit, info, record)
    except BadClip as error:
        problem = error
    content_key = "" if info is None else _content_key(record)  # a pipe would be waited for
    return ClipFacts(record, info, available, bucket, problem, content_key, thumbnail)


def _look(reader: FrameReader, moment: float) -> tuple[tuple[int, int], bytes]:
    """Returns a clip's height and width as shown, and the frame at a moment as a small JPEG file."""
    sizes: list[tuple[int, int]] = []

    def plan(height: int, width: int) -> CoverCrop:
        sizes.append((height, width))
        shown = max(1, round(width * _THUMBNAIL_HEIGHT / height))
        return CoverCrop(_THUMBNAIL_HEIGHT, shown, 0, 0, _THUMBNAIL_HEIGHT, shown)

    picture = reader.read([moment], plan).video_thwc[0]
    return sizes[0], _jpeg(picture)


def _bucket(fit: Fit, info: ClipInfo, record: ClipRecord) -> int:
    """Returns the bucket of a clip; refuses what training would leave out or refuse.

    Raises:
        BadClip: It is too short or too small.
    """
    bucket = fit.bucket(info, record)
    target = (fit.shapes[bucket].height, fit.shapes[bucket].width)
    plan_cover_crop(source=info.shown_size, target=target, max_upscale=fit.max_upscale)
    return bucket


def _jpeg(picture_hwc) -> bytes:
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
    """What a set holds.

    Args:
        name: The set.
        fingerprint: See `ClipSource`.
        ignored: Files that are no clips, by suffix.
        fit: What samples are to be.
        clips: Facts of every clip.
        long_captions: Captions that the text encoder cuts, with their tokens; None: not counted.
        max_tokens: Tokens that the text encoder takes.
    """

    name: str
    fingerprint: str
    ignored: tuple[tuple[str, int], ...]
    fit: Fit
    clips: tuple[ClipFacts, ...]
    long_captions: tuple[tuple[str, int], ...] | None
    max_tokens: int

    def readable(self) -> list[ClipFacts]:
        return [clip for clip in self.clips if clip.info is not None]

    def problems(self) -> dict[str, list[ClipFacts]]:
        """Returns the clips that cannot be used, by cause, the most frequent first."""
        found: dict[str, list[ClipFacts]] = {}
        for clip in self.clips:
            if clip.problem is not None:
                found.setdefault(clip.problem.cause, []).append(clip)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def duplicates(self) -> list[list[ClipFacts]]:
        """Returns groups of clips with the same content."""
        groups: dict[str, list[ClipFacts]] = {}
        for clip in self.clips:
            if clip.content_key:
                groups.setdefault(clip.content_key, []).append(clip)
        return [group for group in groups.values() if len(group) > 1]

    def lines(self) -> Iterator[tuple[str, str]]:
        """Yields what to show, as names and values."""
        infos = [clip.info for clip in self.readable() if clip.info is not None]
        words = [len(caption.split()) for clip in self.clips for caption in clip.record.captions]
        usable = len(self.clips) - sum(map(len, self.problems().values()))
        yield "set", f"{self.name} (fingerprint {self.fingerprint})"
        found = Counter(clip.bucket for clip in self.clips)
        empty = sum(bucket not in found for bucket in range(len(self.fit.shapes)))
        others = f" ({empty} other shapes have no clip)" if empty else ""
        yield "samples", f"{self.fit.fps:g} frames a second; frames x height x width{others}:"
        for bucket, shape in enumerate(self.fit.shapes):
            if bucket in found:
                yield f"  {shape}", f"{found[bucket]} clips"
        yield "clips", f"{len(self.clips)}, of which {usable} usable"
        if infos:
            durations = [info.duration for info in infos]
            yield "length", f"{sum(durations) / 3600:.2f} h in all; {_spread(durations, 's')} each"
            yield "windows", f"{sum(map(self._windows, self.clips))} that do not overlap"
            yield "rates", _most(Counter(f"{info.rate:.3f}".rstrip("0").rstrip(".") for info in infos))
            yield "sizes", _most(Counter(f"{info.height}x{info.width}" for info in infos))
            yield "codecs", _most(Counter(info.codec for info in infos))
        yield "captions", f"{_spread(words, ' words')} each; {len(words) - self._distinct()} repeated"
        if self.long_captions is not None:
            yield "cut captions", f"{len(self.long_captions)} have more than {self.max_tokens} tokens"
        for cause, clips in self.problems().items():
            yield cause, f"{len(clips)}: {', '.join(clip.record.clip_id for clip in clips[:5])}"
        repeated = self.duplicates()
        if repeated:
            first = ", ".join(clip.record.clip_id for clip in repeated[0][:3])
            yield "duplicates", f"{sum(map(len, repeated)) - len(repeated)} clips, such as {first}"
        if self.ignored:
            yield "not clips", ", ".join(f"{count} {suffix}" for suffix, count in self.ignored)

    def _windows(self, clip: ClipFacts) -> int:
        return 0 if clip.bucket is None else clip.available // self.fit.shapes[clip.bucket].frames

    def _distinct(self) -> int:
        return len({caption for clip in self.clips for caption in clip.record.captions})


def _spread(values: Sequence[float], unit: str) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{low:.4g} to {high:.4g}{unit}, median {middle:.4g}"


def _most(counts: Counter[str], shown: int = 6) -> str:
    parts = [f"{name} ({count})" for name, count in counts.most_common(shown)]
    return ", ".join(parts) + (f" and {len(counts) - shown} more" if len(counts) > shown else "")

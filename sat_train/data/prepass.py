"""Prepass over all clips before the first sample: finds short clips, splits long ones, assigns buckets."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from sat_train.data.buckets import BucketAssignment, SampleSpec
from sat_train.data.clip_pool import look_into_clips
from sat_train.data.clips.bad_clip import BadClip, one_clip
from sat_train.data.clips.clip_file import ClipInfo, Span, read_headers, read_stamp
from sat_train.data.failure_log import ClipFailure
from sat_train.data.sources.records import ClipRecord, ClipSource, check_faults
from sat_train.data.window import (
    SHORT_REMEDY,
    count_windows,
    split_chunks,
    usable_part,
)
from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.work_queue import gather_after_work

_PROCESSES = 8  # headers are small and the wait is for the disk
_CLIPS_A_PROCESS = 64  # fewer are read in the time that another process costs
_SHOWN = 10  # clips in one message

Look = Callable[[Sequence[ClipRecord]], list[ClipInfo | BadClip]]


class HeaderMemory(Protocol):
    """Headers of clips that were read before, for as long as their files stay as they are."""

    def recall_info(
        self, path: Path, span: Span | None, stamp: tuple[int, ...], *, with_turn: bool = False
    ) -> ClipInfo | None:
        """Returns the headers of a clip whose file has this state; None where it must be opened for them."""

    def learn_info(self, path: Path, span: Span | None, stamp: tuple[int, ...], info: ClipInfo) -> None:
        """Remembers the headers of a clip that were read after its file had this state."""


@dataclass(frozen=True)
class ClipAssignment:
    """A clip with its headers and bucket.

    Args:
        record: The clip.
        info: Its headers; None if they cannot be read.
        available: Frames that it can give.
        bucket: Index of its samples' shape; None if it fits none.
        problem: Reason why it has no headers or no bucket.
    """

    record: ClipRecord
    info: ClipInfo | None = None
    available: int = 0
    bucket: int | None = None
    problem: BadClip | None = None


@dataclass(frozen=True)
class ClipSet:
    """A set of clips as it is trained on.

    Args:
        sources: Its clips, without those that are left out; long clips are split if the window asks for it.
        buckets: The shape of each clip.
        left_out: Clips that are too short or too small.
        num_padded: Clips whose last frame is repeated.
    """

    sources: tuple[ClipSource, ...]
    buckets: BucketAssignment
    left_out: tuple[ClipFailure, ...] = ()
    num_padded: int = 0


def assign_clips(mesh: ProcessMesh, sources: Sequence[ClipSource], spec: SampleSpec, look: Look) -> ClipSet:
    """Inspects all clips, each rank its share.

    Args:
        mesh: The process mesh.
        sources: The clips, the same on all ranks.
        spec: Shape and rate of the samples.
        look: Reads the headers of clips.

    Raises:
        DataError: Clips are too short under `short_clip: error`; the message counts them.

    Ranks: all.
    """
    records = [record for source in sources for record in source.records]
    shares = gather_after_work(mesh, look(records[mesh.rank :: mesh.world_size]))
    infos = (shares[i % mesh.world_size][i // mesh.world_size] for i in range(len(records)))
    clips = [_assign_clip(record, info, spec) for record, info in zip(records, infos, strict=True)]
    if spec.short_clip == "error":
        _check_lengths(clips, spec)
    left_out = tuple(
        ClipFailure(None, clip.record.clip_id, clip.problem.cause, clip.problem.detail)
        for clip in clips
        if clip.info is not None and clip.problem is not None
    )
    return ClipSet(
        *_arrange(sources, clips, spec),
        left_out,
        sum(clip.bucket is not None and clip.available < spec.shapes[clip.bucket].frames for clip in clips),
    )


def _assign_clip(record: ClipRecord, info: ClipInfo | BadClip, spec: SampleSpec) -> ClipAssignment:
    if isinstance(info, BadClip):
        return ClipAssignment(record, problem=info)
    available = spec.available(info, record)
    try:
        return ClipAssignment(record, info, available, spec.bucket(info, record))
    except BadClip as error:
        return ClipAssignment(record, info, available, problem=error)


def look_at(
    records: Sequence[ClipRecord],
    headers: HeaderMemory | None,
    *,
    with_turn: bool,
    timeout_s: float | None,
) -> list[ClipInfo | BadClip]:
    """Reads the headers of many clips in parallel; an unreadable clip gives its reason.

    Args:
        records: The clips.
        headers: Known headers; only the other clips are opened.
        with_turn: As for `look_into`.
        timeout_s: Time after which a clip is abandoned; None: never.
    """
    look = functools.partial(look_into, with_turn=with_turn, timeout_s=timeout_s)
    if headers is None:
        return _look_into_all(records, look, timeout_s)
    stamps = _read_stamps(records)
    infos: dict[int, ClipInfo | BadClip] = {}
    unknown: dict[int, tuple[int, ...]] = {}  # the state of their files
    for i, record in enumerate(records):
        stamp = stamps[record.path]
        if isinstance(stamp, BadClip):
            infos[i] = stamp
        elif info := headers.recall_info(record.path, record.span, stamp, with_turn=with_turn):
            infos[i] = info
        else:
            unknown[i] = stamp
    new_infos = _look_into_all([records[i] for i in unknown], look, timeout_s)
    for (i, stamp), new_info in zip(unknown.items(), new_infos, strict=True):
        infos[i] = new_info
        if isinstance(new_info, ClipInfo):
            headers.learn_info(records[i].path, records[i].span, stamp, new_info)
    return [infos[i] for i in range(len(records))]


def _look_into_all(
    records: Sequence[ClipRecord], look: Callable[[ClipRecord], ClipInfo], timeout_s: float | None
) -> list[ClipInfo | BadClip]:
    num_processes = min(_PROCESSES, 1 + len(records) // _CLIPS_A_PROCESS)
    return look_into_clips(records, look, num_processes=num_processes, timeout_s=timeout_s)


def _read_stamps(records: Sequence[ClipRecord]) -> dict[Path, tuple[int, ...] | BadClip]:
    """Reads the state of each file once, in parallel, however many clips it holds."""

    def read(path: Path) -> tuple[int, ...] | BadClip:
        try:
            with one_clip():
                return read_stamp(path)
        except BadClip as error:
            return error

    paths = list(dict.fromkeys(record.path for record in records))
    with ThreadPoolExecutor(_PROCESSES) as pool:
        return dict(zip(paths, pool.map(read, paths), strict=True))


def look_into(record: ClipRecord, *, with_turn: bool = False, timeout_s: float | None = None) -> ClipInfo:
    """Reads the headers of one clip; see `read_headers`."""
    return read_headers(record.path, span=record.span, with_turn=with_turn, timeout_s=timeout_s)


def describe_clip_set(clip_set: ClipSet, batch_sizes: Sequence[int], tokens: Sequence[int]) -> str:
    """Returns a table of the buckets, and of the clips that are left out or padded.

    Args:
        clip_set: The set.
        batch_sizes: Samples of all ranks in a micro-batch of each bucket.
        tokens: Tokens of one sample of each bucket.
    """
    lines = ["samples are (frames x height x width)"]
    for shape, clips, size, cost in zip(
        clip_set.buckets.shapes, clip_set.buckets.counts(), batch_sizes, tokens, strict=True
    ):
        if clips:
            rare = f", a batch in {size / clips:.1f} epochs" if clips < size else ""
            lines.append(
                f"  {shape!s:<14} {clips:>8} clips, {size} in a micro-batch, {cost} tokens each{rare}"
            )
    if clip_set.num_padded:
        lines.append(f"{clip_set.num_padded} clips are padded: their last frame is repeated")
    causes = Counter(failure.cause for failure in clip_set.left_out)
    for cause, count in causes.most_common():
        names = [failure.clip_id for failure in clip_set.left_out if failure.cause == cause][:_SHOWN]
        lines.append(f"{count} clips are left out ({cause}): {', '.join(names)}{' ...' * (count > _SHOWN)}")
    return "\n".join(lines)


def chunk_records(record: ClipRecord, info: ClipInfo, spec: SampleSpec, num_frames: int) -> list[ClipRecord]:
    """Splits a long clip into records of equal length, one for each window that fits."""
    count = count_windows(spec.available(info, record), num_frames)
    if count == 1:
        return [record]
    first, last = usable_part(info, record, spec.skip_frms_num)
    parts = []
    for begin, end in split_chunks(first=first, last=last, count=count):
        start, stop = begin - info.first, end - info.first
        name = f"{record.clip_id}[{start:.3f}-{stop:.3f}]"
        parts.append(replace(record, clip_id=name, start=start, end=stop))
    return parts


def _check_lengths(clips: Sequence[ClipAssignment], spec: SampleSpec) -> None:
    short = [
        (clip.record.clip_id, clip.problem.detail)
        for clip in clips
        if clip.problem is not None and clip.problem.cause == "short"
    ]
    check_faults(
        short,
        f"{len(short)} of {len(clips)} clips are too short",
        expected=f"{spec.least_frames} frames at {spec.fps:g} frames a second",
        remedy=SHORT_REMEDY,
    )


def _arrange(
    sources: Sequence[ClipSource], clips: Sequence[ClipAssignment], spec: SampleSpec
) -> tuple[tuple[ClipSource, ...], BucketAssignment]:
    """Returns the sources with the remaining clips, and the bucket of each clip.

    A clip that cannot be read stays, in the bucket that most clips have: it is counted and replaced when its
    turn comes.
    """
    counts = Counter(clip.bucket for clip in clips if clip.bucket is not None)
    usual = counts.most_common(1)[0][0] if counts else 0
    left = iter(clips)
    arranged, of_clips = [], []
    for source in sources:
        records: list[ClipRecord] = []
        buckets: list[int] = []
        for clip in itertools.islice(left, len(source)):
            bucket = usual if clip.info is None else clip.bucket
            if bucket is not None:
                parts = _parts(clip, spec, spec.shapes[bucket].frames)
                records += parts
                buckets += [bucket] * len(parts)
        arranged.append(source.with_records(records))
        of_clips.append(np.array(buckets, np.int64))
    return tuple(arranged), BucketAssignment(spec.shapes, tuple(of_clips))


def _parts(clip: ClipAssignment, spec: SampleSpec, num_frames: int) -> list[ClipRecord]:
    if spec.window != "chunks" or clip.info is None or clip.info.is_image:
        return [clip.record]
    return chunk_records(clip.record, clip.info, spec, num_frames)

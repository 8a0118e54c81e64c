"""What must be known of all clips before the first sample: which are too short, which are cut."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sat_train.data.clip_file import ClipInfo, open_clip, read_info
from sat_train.data.dataset import usable_part
from sat_train.data.failures import BadClip
from sat_train.data.sources import ClipRecord
from sat_train.data.window import count_frames, split_chunks

_THREADS = 8  # headers are small and the wait is for the disk

Probed = tuple[ClipRecord, ClipInfo | BadClip]


def probe_clips(records: Sequence[ClipRecord], *, timeout_s: float | None = None) -> list[Probed]:
    """Reads the headers of many clips at once; one that cannot be read gives its reason."""

    def probe(record: ClipRecord) -> Probed:
        try:
            with open_clip(record.path, span=record.span, timeout_s=timeout_s) as (container, stream):
                return record, read_info(container, stream)
        except BadClip as error:
            return record, error

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(probe, records))


def keep_long(
    clips: Sequence[Probed], *, fps: float, num_frames: int, skip_frms_num: int = 0
) -> list[Probed]:
    """Keeps the clips that give `num_frames` at `fps`, and unreadable ones: those count as bad later."""

    def is_long(record: ClipRecord, info: ClipInfo | BadClip) -> bool:
        if isinstance(info, BadClip):
            return True
        first, last = usable_part(info, record, skip_frms_num)
        return count_frames(first=first, last=last, rate=info.rate, fps=fps) >= num_frames

    return [(record, info) for record, info in clips if is_long(record, info)]


def cut_chunks(
    clips: Sequence[Probed], *, fps: float, num_frames: int, skip_frms_num: int = 0
) -> list[ClipRecord]:
    """Turns each long clip into several records of equal length, one for each window that fits."""
    parts: list[ClipRecord] = []
    for record, info in clips:
        if isinstance(info, BadClip) or info.is_image:
            parts.append(record)
            continue
        first, last = usable_part(info, record, skip_frms_num)
        for begin, end in split_chunks(first=first, last=last, window=num_frames / fps):
            part = (begin - info.first, end - info.first)
            name = f"{record.clip_id}[{part[0]:.3f}-{part[1]:.3f}]"
            parts.append(replace(record, clip_id=name, start=part[0], end=part[1]))
    return parts

"""Chooses the times of a clip that a sample shows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import ClipInfo
from sat_train.data.clips.clip_times import HEADER_ROUNDING_S
from sat_train.data.sources.records import ClipRecord

WindowMode = Literal["head", "center", "random", "uniform", "chunks"]
ShortClip = Literal["error", "skip", "pad", "shrink"]

SHORT_REMEDY = "set data.params.short_clip to skip, pad or shrink, or lower max_num_frames"


@dataclass(frozen=True)
class Window:
    """Times of a sample's frames: `start + i / fps`.

    Args:
        start: Time of the first frame, in seconds of the file's clock.
        count: Frames to read.
        total: Frames of the sample; more than `count` if the last one is repeated.
    """

    start: float
    count: int
    total: int


def usable_part(info: ClipInfo, record: ClipRecord, skip_frms_num: int) -> tuple[float, float]:
    """Returns the times of the first and the last usable frame, in seconds of the file's clock."""
    if info.is_image:
        return info.first, info.first
    margin = skip_frms_num / info.rate
    first, last = info.first + margin, info.last - margin
    if record.start is not None:
        first = max(first, info.first + record.start)
    if record.end is not None:
        last = min(last, info.first + record.end)
    return first, last


def count_frames(*, first: float, last: float, rate: float, fps: float) -> int:
    """Returns the number of frames at `fps` that a clip can give, the last one at most half a source frame
    late.

    Args:
        first: When the first usable frame is shown, in seconds.
        last: When the last usable frame is shown.
        rate: Frames per second of the source.
        fps: Frames per second of the sample.
    """
    if last <= first:
        return 1 if last == first else 0
    return math.floor((last - first + 0.5 / rate + HEADER_ROUNDING_S) * fps) + 1


def fit_frames(available: int, *, num_frames: int, policy: ShortClip) -> tuple[int, int]:
    """Decides the number of frames of a clip's samples.

    Args:
        available: Frames that the clip can give.
        num_frames: Frames of a sample.
        policy: Treatment of shorter clips. `shrink` has chosen a smaller number before.

    Returns:
        Frames to read, and frames of the sample, which are more if the last one is repeated.

    Raises:
        BadClip: The clip is too short for the policy.
    """
    if available >= num_frames:
        return num_frames, num_frames
    if policy == "pad" and available > 0:
        return available, num_frames
    raise BadClip("short", f"it gives {available} of {num_frames} frames")


def window_start(
    mode: WindowMode,
    *,
    first: float,
    last: float,
    length: float,
    generator: torch.Generator | None = None,
    visit: int = 0,
) -> float:
    """Returns the start of the window.

    Args:
        mode: `head` the beginning; `center` the middle; `random` (and `chunks`, within a chunk) anywhere;
            `uniform` starts that successive visits spread evenly over the clip.
        first: When the first usable frame is shown, in seconds.
        last: When the last usable frame is shown.
        length: Seconds from the window's first frame to its last.
        generator: Generator for `random`.
        visit: Number of earlier uses of the clip, for `uniform`.
    """
    slack = max(0.0, last - first - length)
    if mode == "head":
        return first
    if mode == "center":
        return first + slack / 2
    if mode == "uniform":
        return first + slack * _spread(visit)
    return first + slack * torch.rand((), generator=generator, dtype=torch.float64).item()


def _spread(visit: int) -> float:
    """Returns 0, 1, 1/2, 1/4, 3/4, 1/8, ...: any prefix covers 0..1 evenly (van der Corput's sequence)."""
    if visit < 2:
        return float(visit)
    value, step, rest = 0.0, 0.5, visit - 1
    while rest:
        value, step, rest = value + step * (rest & 1), step / 2, rest >> 1
    return value


def count_windows(available: int, num_frames: int) -> int:
    """Returns the number of windows in a clip that share no frame; a clip that is too short counts as one.

    Args:
        available: Frames that the clip can give, from `count_frames`.
        num_frames: Frames of a window.
    """
    return max(1, available // num_frames)


def split_chunks(*, first: float, last: float, count: int) -> Sequence[tuple[float, float]]:
    """Splits a long clip into equal parts, each of which becomes a sample.

    With `count_windows` parts each part holds a window: it is at least as long as the time from the window's
    first frame to its last.

    Args:
        first: When the first usable frame is shown, in seconds.
        last: When the last usable frame is shown.
        count: Number of parts.

    Returns:
        Start and end of each part, in seconds.
    """
    edges = [first + (last - first) * i / count for i in range(count + 1)]
    return list(itertools.pairwise(edges))

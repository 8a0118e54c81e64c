"""Assigns the samples of each clip to a shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sat_train.config.shapes import SAME_ASPECT, ClipShape
from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.sampler import ClipRef
from sat_train.data.sources.records import ClipSource
from sat_train.data.window import ShortClip


@dataclass(frozen=True)
class BucketAssignment:
    """Shapes of the clips of a set.

    Args:
        shapes: The buckets' shapes.
        of_clips: For each source, the bucket of each clip, int64.
    """

    shapes: tuple[ClipShape, ...]
    of_clips: tuple[np.ndarray, ...]

    def bucket(self, ref: ClipRef) -> int:
        """Returns the bucket of a clip."""
        return int(self.of_clips[ref.source][ref.clip])

    def shape(self, ref: ClipRef) -> ClipShape:
        """Returns the shape of a clip's samples."""
        return self.shapes[self.bucket(ref)]

    def counts(self) -> list[int]:
        """Returns the number of clips in each bucket."""
        clips = np.concatenate(self.of_clips)
        counts: list[int] = np.bincount(clips, minlength=len(self.shapes)).tolist()
        return counts


def one_bucket(shape: ClipShape, sources: Sequence[ClipSource]) -> BucketAssignment:
    """Returns the buckets of a set whose samples all have the same shape."""
    return BucketAssignment((shape,), tuple(np.zeros(len(source), np.int64) for source in sources))


def choose_bucket(
    *,
    available: int,
    size: tuple[int, int],
    shapes: Sequence[ClipShape],
    short_clip: ShortClip,
    max_upscale: float,
) -> int:
    """Chooses the bucket of a clip: the most frames that it fills, then the size nearest in aspect ratio.

    Of several sizes with the same aspect ratio it takes the largest that does not enlarge the clip too much.

    Args:
        available: Frames that the clip can give.
        size: Its height and width as shown.
        shapes: The buckets' shapes.
        short_clip: With `pad`, a clip shorter than all shapes goes into the shortest one.
        max_upscale: Largest factor by which a picture may be enlarged. Without a choice of sizes it is
            checked when the clip is read.

    Raises:
        BadClip: The clip is too short, or too small for every size.
    """
    least = min(shape.frames for shape in shapes)
    if available < least and (short_clip != "pad" or available < 1):
        raise BadClip("short", f"it gives {available} of {least} frames")
    frames = max((shape.frames for shape in shapes if shape.frames <= available), default=least)
    buckets = [bucket for bucket, shape in enumerate(shapes) if shape.frames == frames]
    if len(buckets) == 1:
        return buckets[0]
    usable = [bucket for bucket in buckets if _enlargement(size, shapes[bucket]) <= max_upscale]
    if not usable:
        least_enlarged = min(_enlargement(size, shapes[bucket]) for bucket in buckets)
        raise BadClip(
            "too small",
            f"{size[0]}x{size[1]} (height x width) must be enlarged {least_enlarged:.2f} times for the "
            f"smallest bucket, but data.params.max_upscale allows {max_upscale:g}",
        )
    nearest = min(_aspect_distance(size, shapes[bucket]) for bucket in usable)
    same = [b for b in usable if _aspect_distance(size, shapes[b]) <= nearest + SAME_ASPECT]
    return max(same, key=lambda b: (shapes[b].height * shapes[b].width, -_aspect_distance(size, shapes[b])))


def _enlargement(size: tuple[int, int], shape: ClipShape) -> float:
    return max(shape.height / size[0], shape.width / size[1])


def _aspect_distance(size: tuple[int, int], shape: ClipShape) -> float:
    return abs(math.log(size[1] / size[0]) - math.log(shape.width / shape.height))

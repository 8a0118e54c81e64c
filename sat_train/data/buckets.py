"""Assigns the samples of each clip to a shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sat_train.config.shapes import SAME_ASPECT, ClipShape
from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import ClipInfo
from sat_train.data.sampler import ClipRef
from sat_train.data.sources.records import ClipRecord, ClipSource
from sat_train.data.window import ShortClip, WindowMode, count_frames, usable_part


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


@dataclass(frozen=True)
class SampleSpec:
    """Shape and rate of the samples, and the treatment of clips that do not fit.

    Args:
        shapes: Shapes that samples may have.
        fps: Frames per second.
        skip_frms_num: Source frames left out at both ends of a file.
        window: Choice of the part of a longer clip.
        short_clip: Treatment of a clip shorter than the window.
        max_upscale: Largest factor by which a picture may be enlarged.
        images: Whether clips are conditioned on their images.
    """

    shapes: tuple[ClipShape, ...]
    fps: float
    skip_frms_num: int = 0
    window: WindowMode = "random"
    short_clip: ShortClip = "error"
    max_upscale: float = 2.0
    images: bool = False

    @property
    def least_frames(self) -> int:
        """Smallest number of frames that a clip must give."""
        return min(shape.frames for shape in self.shapes)

    @property
    def needs_turn(self) -> bool:
        """True where the rotation of a picture matters, because there is a choice of sizes."""
        return len({(shape.height, shape.width) for shape in self.shapes}) > 1

    def available(self, info: ClipInfo, record: ClipRecord) -> int:
        """Returns the number of frames that a clip can give."""
        first, last = usable_part(info, record, self.skip_frms_num)
        return count_frames(first=first, last=last, rate=info.rate, fps=self.fps)

    def bucket(self, info: ClipInfo, record: ClipRecord) -> int:
        """Returns the bucket of a clip.

        Raises:
            BadClip: It is too short or too small for all of them.
        """
        return self.choose_bucket(self.available(info, record), info.shown_size)

    def choose_bucket(self, available: int, size: tuple[int, int]) -> int:
        """Chooses the bucket of a clip: the most frames that it fills, then the size nearest in aspect ratio.

        Of several sizes with the same aspect ratio it takes the largest that does not enlarge the clip too
        much. With `short_clip: pad`, a clip shorter than all shapes goes into the shortest one. Without a
        choice of sizes, the enlargement is checked when the clip is read.

        Args:
            available: Frames that the clip can give.
            size: Its height and width as shown.

        Raises:
            BadClip: The clip is too short, or too small for every size.
        """
        least = self.least_frames
        if available < least and (self.short_clip != "pad" or available < 1):
            raise BadClip("short", f"it gives {available} of {least} frames")
        frames = max((shape.frames for shape in self.shapes if shape.frames <= available), default=least)
        buckets = [bucket for bucket, shape in enumerate(self.shapes) if shape.frames == frames]
        if len(buckets) == 1:
            return buckets[0]
        usable = [bucket for bucket in buckets if _enlargement(size, self.shapes[bucket]) <= self.max_upscale]
        if not usable:
            least_enlarged = min(_enlargement(size, self.shapes[bucket]) for bucket in buckets)
            raise BadClip(
                "too small",
                f"{size[0]}x{size[1]} (height x width) must be enlarged {least_enlarged:.2f} times for the "
                f"smallest bucket, but data.params.max_upscale allows {self.max_upscale:g}",
            )
        nearest = min(_aspect_distance(size, self.shapes[bucket]) for bucket in usable)
        same = [b for b in usable if _aspect_distance(size, self.shapes[b]) <= nearest + SAME_ASPECT]
        return max(
            same,
            key=lambda b: (
                self.shapes[b].height * self.shapes[b].width,
                -_aspect_distance(size, self.shapes[b]),
            ),
        )


def one_bucket(shape: ClipShape, sources: Sequence[ClipSource]) -> BucketAssignment:
    """Returns the buckets of a set whose samples all have the same shape."""
    return BucketAssignment((shape,), tuple(np.zeros(len(source), np.int64) for source in sources))


def _enlargement(size: tuple[int, int], shape: ClipShape) -> float:
    return max(shape.height / size[0], shape.width / size[1])


def _aspect_distance(size: tuple[int, int], shape: ClipShape) -> float:
    return abs(math.log(size[1] / size[0]) - math.log(shape.width / shape.height))

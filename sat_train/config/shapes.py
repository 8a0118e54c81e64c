"""Shapes of samples: frames, height and width."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from sat_train.config.geometry import Geometry
from sat_train.config.schema.data_section import VideoDatasetParams

ASPECT = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})", re.ASCII)
SAME_ASPECT = 0.03  # sizes of one aspect differ by this much, as they are rounded to whole patches


class ClipShape(NamedTuple):
    """Shape of a sample.

    Args:
        frames: Pixel frames, 4k + 1.
        height: In pixels.
        width: In pixels.
    """

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def allowed_sizes(params: VideoDatasetParams, geometry: Geometry) -> tuple[tuple[int, int], ...]:
    """Returns heights and widths: `video_size`, and those of `buckets`; each once."""
    sizes = [params.video_size]
    if params.buckets is not None:
        sizes += params.buckets.sizes
        aspects = filter(ASPECT.fullmatch, params.buckets.aspects)  # a rule names those that are not sizes
        sizes += [size_of_aspect(aspect, params.video_size, geometry) for aspect in aspects]
    return tuple(dict.fromkeys(sizes))


def allowed_frames(params: VideoDatasetParams, geometry: Geometry) -> tuple[int, ...]:
    """Returns numbers of frames, the largest first: `max_num_frames`, those of `buckets`, and with
    `short_clip: shrink` all smaller ones at which the model's patches are filled as at `max_num_frames`."""
    frames = {params.max_num_frames, *(params.buckets.frames if params.buckets is not None else ())}
    if params.short_clip == "shrink":
        frames.update(range(params.max_num_frames, 0, -geometry.frame_step))
        frames.add(1)
    return tuple(sorted(frames, reverse=True))


def allowed_shapes(params: VideoDatasetParams, geometry: Geometry) -> tuple[ClipShape, ...]:
    """Returns every shape that a sample may have; with neither buckets nor shrinking it is one."""
    sizes = allowed_sizes(params, geometry)
    return tuple(ClipShape(frames, *size) for frames in allowed_frames(params, geometry) for size in sizes)


def size_of_aspect(aspect: str, video_size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Returns the largest height and width of an aspect with at most as many pixels as `video_size`.

    For the aspect of `video_size` it is `video_size` itself.

    Args:
        aspect: `width:height`.
        video_size: Height and width.
        geometry: Holds the multiples that sizes must be.
    """
    match = ASPECT.fullmatch(aspect)
    assert match is not None, aspect
    area, ratio = video_size[0] * video_size[1], int(match[1]) / int(match[2])
    if abs(math.log(ratio * video_size[0] / video_size[1])) <= SAME_ASPECT:
        return video_size
    height_by, width_by = geometry.size_multiples
    height = max(1, math.floor(math.sqrt(area / ratio) / height_by + 1e-6)) * height_by
    width = max(1, math.floor(math.sqrt(area * ratio) / width_by + 1e-6)) * width_by
    return height, width

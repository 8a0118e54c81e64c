"""Shows samples with their fields, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.data.fields.reader import FieldReader

_GAP = 2  # pixels between pictures


def show_sample(sample: VideoSample, readers: Mapping[str, FieldReader]) -> list[tuple[str, Tensor]]:
    """Returns the videos that show a sample, each with a title: the clip, then its fields.

    Fields that are no pictures stand in the title of the clip.

    Args:
        sample: The sample.
        readers: Readers of its fields, by name.
    """
    title, videos = sample.caption, []
    for name, reader in readers.items():
        value = sample.fields[name]
        views = reader.views(value, sample.video_tchw)
        title += "" if views else f" | {name}: {_words(value)}"
        videos += [(f"{name} ({reader.params.kind})", view) for view in views]
    return [(title, sample.video_tchw), *videos]


def join_videos(videos: list[Tensor]) -> Tensor:
    """Joins videos of one shape from left to right, uint8 [t, 3, h, w]."""
    gap = torch.full((*videos[0].shape[:3], _GAP), 255, dtype=torch.uint8)
    parts = [part for video in videos for part in (gap, video)]
    return torch.cat(parts[1:], dim=3)


def _words(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else str(value)

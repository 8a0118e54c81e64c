"""A few drawn clips with fields in a folder of files, for configurations without data of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sat_train.config.parts.field_parts import FieldConfig
from sat_train.distributed.seeds import derive_generator
from sat_train.files import write_text
from sat_train.sampling.video_file import write_mp4

CLIPS = 6
FRAMES = 9
FPS = 8
SIZE = 64

Shapes = Mapping[str, Sequence[int]]
# Shapes of numbers behind the frames, by what they are in space.
_SHAPES: Mapping[str, Sequence[int]] = {"intrinsics": (4,), "poses": (3, 4), "points": (4, 2), "none": (8,)}


def write_clips(folder: Path, fields: Mapping[str, FieldConfig], shapes: Shapes) -> Path:
    """Writes clips as long as a sample, each a square that moves over noise, with captions and fields.

    One sample has one window, so that the samples of later epochs are those of the first again.

    Args:
        folder: Folder to create.
        fields: The fields, by name.
        shapes: Of fields of numbers, the shape of a frame's or a sample's, by name.

    Returns:
        The folder.
    """
    for number in range(CLIPS):
        write_mp4(folder / "videos" / f"{number}.mp4", draw_clip(number), fps=FPS)
        (folder / "labels").mkdir(parents=True, exist_ok=True)
        write_text(folder / "labels" / f"{number}.txt", f"a square of kind {number} moves over noise\n")
        for name, field in fields.items():
            place = folder / (field.settings.column or name)
            place.mkdir(exist_ok=True)
            _write_field(place, number, name, field, shapes)
    return folder


def draw_clip(number: int, *, variant: int = 0) -> Tensor:
    """Returns a clip, uint8 `[t, 3, h, w]`; it depends on its number and variant alone."""
    generator = derive_generator(2, "clip", number, variant)
    ground_3hw = torch.randint(0, 128, (3, SIZE // 8, SIZE // 8), generator=generator)
    frame_3hw = ground_3hw.repeat_interleave(8, 1).repeat_interleave(8, 2).to(torch.uint8)
    video_tchw = frame_3hw.repeat(FRAMES, 1, 1, 1)
    color = torch.randint(128, 256, (3, 1, 1), generator=generator)
    for frame, square in zip(video_tchw, _squares(number), strict=True):
        frame[:, square, square] = color.to(torch.uint8)
    return video_tchw


def _squares(number: int) -> list[slice]:
    return [slice(4 + index * (2 + number % 3), 24 + index * (2 + number % 3)) for index in range(FRAMES)]


def _write_field(place: Path, number: int, name: str, field: FieldConfig, shapes: Shapes) -> None:
    if field.kind == "text":
        write_text(place / f"{number}.txt", f"{name} {number}\n")
    elif field.kind in ("per_frame", "array"):
        np.save(place / f"{number}.npy", _numbers(number, name, field, shapes))
    elif field.kind == "mask":
        mask_tchw = torch.zeros(FRAMES, 3, SIZE, SIZE, dtype=torch.uint8)
        for frame, square in zip(mask_tchw, _squares(number), strict=True):
            frame[:, square, square] = 255
        write_mp4(place / f"{number}.mp4", mask_tchw, fps=FPS)
    else:
        for index in range(field.settings.num_files):
            stem = str(number) if field.settings.num_files == 1 else f"{number}_{index}"
            variant = 1 + index + sum(map(ord, name))
            write_mp4(place / f"{stem}.mp4", draw_clip(number, variant=variant), fps=FPS)


def _numbers(number: int, name: str, field: FieldConfig, shapes: Shapes) -> Any:
    """Returns numbers that make sense in their space, as float32 array."""
    space = getattr(field.settings, "space", "none")
    shape = tuple(shapes.get(name, _SHAPES[space]))
    rows = (FRAMES, *shape) if field.kind == "per_frame" else shape
    noise = torch.randn(rows, generator=derive_generator(2, name, number)).numpy()
    if space == "none":
        return noise.astype(np.float32)
    middle = {"intrinsics": float(SIZE), "points": SIZE / 2, "poses": 0.0}[space]
    numbers = middle + 0.1 * noise
    if space == "poses" and shape[-2:] in ((3, 4), (4, 4)):
        numbers[..., :3, :3] += np.eye(3)
        numbers[..., 3:, :] = [0, 0, 0, 1]
    return numbers.astype(np.float32)

"""Fields share their clip's moments, scale and crop, on random clips whose pixels tell place and time.

Red tells how far right a pixel lies in the whole picture, green how far down, blue the number of the frame:
what the reader says of itself is not believed. `FIELD_CLIPS=1000` tries as many clips.
"""

from __future__ import annotations

import bisect
import os
import random
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from sat_train.config.parts.field_parts import FieldConfig
from sat_train.config.shapes import ClipShape
from sat_train.data.sources.records import FieldFile, FieldPlace
from tests.unit.data.videos import dataset_of, record_of

COUNT = int(os.environ.get("FIELD_CLIPS", "6"))
RATES = [*map(Fraction, (8, 10, 12, 15, 24, 25, 30, 50)), Fraction(24000, 1001), Fraction(30000, 1001)]
STEP = 4  # of blue between two frames
MOST_FRAMES = 60
MS = 1.1e-3  # clock of mkv
LEVELS = 2.5  # by which lossless coding in YUV and bicubic scaling change a colour

pytestmark = pytest.mark.timeout(300 + 3 * COUNT)


@dataclass(frozen=True)
class Written:
    """A video file.

    Args:
        path: The file.
        shown: When each of its frames is shown, in seconds from the first one.
        size: Height and width.
    """

    path: Path
    shown: tuple[float, ...]
    size: tuple[int, int]

    def gap(self, moment: float) -> float:
        """Half the time between the two frames around a moment."""
        right = min(max(1, bisect.bisect(self.shown, moment)), len(self.shown) - 1)
        return (self.shown[right] - self.shown[right - 1]) / 2 if len(self.shown) > 1 else np.inf


def write(dice: random.Random, path: Path, size: tuple[int, int], seconds: float, draw) -> Written:
    """Writes a video of random rate, container and clock that lasts at least `seconds`."""
    rate = dice.choice([rate for rate in RATES if rate * Fraction(seconds) < MOST_FRAMES])
    count = int(rate * Fraction(seconds)) + 2
    pauses = [Fraction(dice.choice((1, 1, 1, 2, 3)) if dice.random() < 0.3 else 1) for _ in range(count)]
    moments = [pause / rate for pause in accumulate(pauses, initial=Fraction(0))][:count]
    if dice.random() < 0.7:
        moments = [Fraction(i) / rate for i in range(count)]
    start, base = Fraction(dice.choice((0, 0, 1370)), 1000), Fraction(1, 90000)
    in_mp4 = dice.random() < 0.5
    path = path.with_suffix(".mp4" if in_mp4 else ".mkv")
    codec = ("libx264", "yuv444p", {"qp": "0", "preset": "ultrafast", "bf": str(dice.choice((0, 2)))})
    codec = codec if in_mp4 else ("ffv1", "bgr0", {})
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec[0], rate=rate, options={**codec[2], "threads": "1"})
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size, stream.codec_context.time_base = codec[1], 12, base
        for i, moment in enumerate(moments):
            frame = av.VideoFrame.from_ndarray(draw(i, *size), format="rgb24")
            frame.time_base, frame.pts = base, round((moment + start) / base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return Written(path, tuple(map(float, moments)), size)


def draw_place(number: int, height: int, width: int) -> np.ndarray:
    """Draws position and number of a frame, uint8 `[h, w, 3]`."""
    picture = np.empty((height, width, 3))
    picture[..., 0] = (np.arange(width) + 0.5) / width * 240 + 8
    picture[..., 1] = ((np.arange(height) + 0.5) / height * 240 + 8)[:, None]
    picture[..., 2] = number * STEP + 8
    return picture.round().astype(np.uint8)


def draw_mask(number: int, height: int, width: int) -> np.ndarray:
    """Draws a mask that ends further right in each frame: the share of the width is (number + 1) / 64."""
    inside = (np.arange(width) + 0.5) / width < (number + 1) / 64
    return np.broadcast_to(np.where(inside, 255, 0).astype(np.uint8)[:, None], (height, width, 3)).copy()


def numbers(video_tchw: torch.Tensor) -> list[int]:
    return [round((value - 8) / STEP) for value in video_tchw[:, 2].float().mean(dim=(1, 2)).tolist()]


def places(picture_chw: torch.Tensor) -> torch.Tensor:
    """Reads for each pixel how far right and how far down it lies, as shares."""
    return (picture_chw[:2].float() - 8) / 240


def scaled(dice: random.Random, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the size of the same picture in another resolution, rounded as tools do."""
    factor = dice.uniform(0.5, 1.6)
    return tuple(max(16, round(side * factor)) for side in size)


KINDS = {
    "control": {"kind": "video"},
    "inside": {"kind": "mask"},
    "camera": {"kind": "per_frame", "space": "intrinsics"},
    "points": {"kind": "per_frame", "space": "points"},
    "own": {"kind": "per_frame", "fps": 20},
    "lost": {"kind": "pair"},
}


def make(dice: random.Random, folder: Path):
    """Writes a random clip with its fields, and returns clip, control, mask, arrays and sample."""
    size = (dice.randint(40, 96), dice.randint(40, 96))
    target = (dice.randrange(16, 57, 8), dice.randrange(16, 57, 8))
    frames, fps = dice.choice((1, 5, 9, 13)), dice.choice((8, 10, 16))
    seconds = (frames - 1) / fps
    is_short = frames > 5 and dice.random() < 0.25
    length = seconds * (0.5 if is_short else dice.uniform(1.05, 1.6)) + 0.2
    clip = write(dice, folder / "clip", size, length, draw_place)
    end = clip.shown[-1] + 0.2
    control = write(dice, folder / "control", scaled(dice, size), end, draw_place)
    mask = write(dice, folder / "inside", scaled(dice, size), end, draw_mask)
    rows = np.array([[dice.uniform(30, 90) for _ in range(4)] for _ in clip.shown])
    points = np.array(
        [[[dice.uniform(0, size[1]), dice.uniform(0, size[0]), 7] for _ in range(5)] for _ in clip.shown]
    )
    np.save(folder / "camera.npy", rows)
    np.save(folder / "points.npy", points.astype(np.float32))
    np.save(folder / "own.npy", np.arange(int(end * 20) + 2))
    files = {"control": control.path, "inside": mask.path, "lost": control.path}
    files |= {name: folder / f"{name}.npy" for name in ("camera", "points", "own")}
    found = {name: FieldPlace((FieldFile(path, suffix=path.suffix),)) for name, path in files.items()}
    readers = {name: FieldConfig._choose(settings).build() for name, settings in KINDS.items()}
    dataset = dataset_of(
        [record_of(clip.path, fields=found)],
        shape=ClipShape(frames, *target),
        fps=fps,
        window=dice.choice(("random", "uniform", "head", "center")),
        short_clip="pad",
        max_upscale=4,
        fields=readers,
        seed=dice.randrange(1000),
    )
    return clip, control, mask, rows, points, dataset.sample(dice.randrange(50), dataset.order.clip_ref(0))


def check_moments(clip, control, mask, sample, number_of) -> None:
    """Each frame of a field is the one nearest to the moment of the clip's frame."""
    moments = [clip.shown[i] for i in number_of]
    for field, found in (
        (control, numbers(sample.fields["control"])),
        (control, numbers(sample.fields["lost"][0])),
    ):
        for moment, number in zip(moments, found, strict=True):
            assert abs(field.shown[number] - moment) <= field.gap(moment) + MS
    for moment, row in zip(moments, sample.fields["own"].tolist(), strict=True):
        assert abs(row / 20 - moment) <= 0.5 / 20 + MS
    for moment, picture, inside in zip(moments, sample.video_tchw, sample.fields["inside"], strict=True):
        edge = _edge(picture, inside[0])
        if edge is not None:
            allowed = [
                n for n, shown in enumerate(mask.shown) if abs(shown - moment) <= mask.gap(moment) + MS
            ]
            blur = 1 / mask.size[1] + 1.5 / sample.video_tchw.shape[-1]
            assert any(abs((n + 1) / 64 - edge) <= blur for n in allowed)


def _edge(picture_chw: torch.Tensor, mask_hw: torch.Tensor) -> float | None:
    """Returns where a mask ends, as a share of the width of the whole picture; None: outside of the crop."""
    across = places(picture_chw)[0].mean(dim=0)
    columns = mask_hw.float().mean(dim=0)
    assert ((columns == 0) | (columns == 1)).all()
    count = int(columns.sum())
    assert columns[:count].all()
    return None if count in (0, len(columns)) else float(across[count - 1] + across[count]) / 2


def check_crop(size, sample) -> None:
    """Clip, control and losing video show the same part of the picture."""
    for other in (sample.fields["control"], sample.fields["lost"][0]):
        off = (sample.video_tchw[:, :2].float() - other[:, :2].float()).abs()
        # rounding to whole pixels may change each side of the field by half a pixel
        assert off.mean() <= LEVELS + 240 / min(size) / 2


def placed(size, target) -> tuple[float, float, int, int]:
    """Returns scale and corner of the crop, from the formula: across, down, left, top."""
    height, width = target
    factor = max(height / size[0], width / size[1])
    tall, wide = max(height, round(size[0] * factor)), max(width, round(size[1] * factor))
    return wide / size[1], tall / size[0], (wide - width) // 2, (tall - height) // 2


def check_numbers(size, rows, points, sample, number_of) -> None:
    """Cameras and points lie in the sample where the formula says, within a hundredth of a pixel."""
    across, down, left, top = placed(size, sample.video_tchw.shape[-2:])
    world = np.array([0.3, -0.2, 1.7])
    for i, number in enumerate(number_of):
        fx, fy, cx, cy = rows[number]
        u, v = fx * world[0] / world[2] + cx, fy * world[1] / world[2] + cy
        fx, fy, cx, cy = sample.fields["camera"][i].double().numpy()
        assert abs(fx * world[0] / world[2] + cx - (u * across - left)) < 0.01
        assert abs(fy * world[1] / world[2] + cy - (v * down - top)) < 0.01
        wanted = points[number][:, :2] * [across, down] - [left, top]
        assert np.abs(sample.fields["points"][i][:, :2].numpy() - wanted).max() < 0.01
        assert (sample.fields["points"][i][:, 2] == 7).all()
        check_colors(points[number] / [*size[::-1], 1], sample.fields["points"][i], sample.video_tchw[i])


def check_colors(shares_nc, moved_nc, picture_chw) -> None:
    """The picture at a moved point says that this is where the point was."""
    height, width = picture_chw.shape[-2:]
    whole = places(picture_chw)
    for (x, y, _), (u, v, _) in zip(shares_nc, moved_nc.tolist(), strict=True):
        if 2 <= u < width - 2 and 2 <= v < height - 2:
            at = whole[:, int(v), int(u)]
            step = (whole[:, int(v) + 1, int(u) + 1] - whole[:, int(v) - 1, int(u) - 1]) / 2
            at = at + step * torch.tensor([u % 1 - 0.5, v % 1 - 0.5])
            assert (at - torch.tensor([x, y])).abs().max() <= 2 * LEVELS / 240


@pytest.mark.parametrize("number", range(COUNT))
def test_fields_share_moments_and_picture_with_their_clip(tmp_path, number):
    dice = random.Random(number)
    clip, control, mask, rows, points, sample = make(dice, tmp_path)
    number_of = numbers(sample.video_tchw)
    assert set(sample.fields["inside"].unique().tolist()) <= {0, 1}
    assert number_of[sample.num_shown :] == number_of[sample.num_shown - 1 : sample.num_shown] * (
        len(number_of) - sample.num_shown
    )
    check_moments(clip, control, mask, sample, number_of)
    check_crop(clip.size, sample)
    check_numbers(clip.size, rows, points, sample, number_of)

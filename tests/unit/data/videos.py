"""Small videos whose every frame carries its own number, and sets made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from sat_train.config.shapes import ClipShape
from sat_train.data.buckets import SampleSpec, one_bucket
from sat_train.data.dataset import VideoDataset
from sat_train.data.sampler import GlobalOrder
from sat_train.data.sources.records import ClipRecord, ClipSource

SIDE = 32
_CELL = 8  # sixteen cells, black or white: the bits of the number


def draw_number(number: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """Returns a picture, uint8 `[height, width, 3]`, that shows `number`."""
    bits = [(number >> i) & 1 for i in range(16)]
    cells = np.array(bits, np.uint8).reshape(4, 4) * 200 + 28
    return np.kron(cells, np.ones((height // 4, width // 4), np.uint8))[..., None].repeat(3, axis=2)


def read_number(picture: np.ndarray) -> int:
    """Reads the number back from a picture `[h, w, 3]` of any size."""
    height, width = picture.shape[0] // 4, picture.shape[1] // 4
    blocks = picture.mean(axis=2)[: 4 * height, : 4 * width].reshape(4, height, 4, width)
    middle = blocks[:, height // 4 : -(height // 4) or None, :, width // 4 : -(width // 4) or None]
    bits = (middle.mean(axis=(1, 3)) > 128).reshape(-1)
    return int(sum(1 << i for i, bit in enumerate(bits) if bit))


def numbers_of(video_tchw: torch.Tensor) -> list[int]:
    return [read_number(picture.permute(1, 2, 0).numpy()) for picture in video_tchw]


def write_numbered(
    path: Path,
    *,
    num_frames: int = 60,
    rate: Fraction | int = 30,
    times: Sequence[Fraction] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    options: dict[str, str] | None = None,
    side: int = SIDE,
    height: int | None = None,
    width: int | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
    index_first: bool = False,
    container_options: dict[str, str] | None = None,
) -> list[float]:
    """Writes a video; frame i shows the number i.

    Args:
        times: When each frame is shown, in seconds; None: at `rate`.
        side: Height and width of the picture, where these are not given.
        aspect: Of one pixel, width over height; None: not told.
        index_first: Put an mp4 file's index before its frames.
        container_options: What the muxer is told.

    Returns:
        When each frame is shown.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = height or side, width or side
    moments = [Fraction(i) / rate for i in range(num_frames)] if times is None else list(times)
    base = Fraction(1, 90000) if times is not None else 1 / Fraction(rate)
    quality = {"crf": "12", "preset": "ultrafast", "bf": "2", "threads": "1"} if codec == "libx264" else {}
    flags = {"movflags": "+faststart"} if index_first else (container_options or {})
    with av.open(str(path), "w", options=flags) as container:
        stream = container.add_stream(codec, rate=rate, options={**quality, **(options or {})})
        stream.width, stream.height = width, height
        stream.pix_fmt = pix_fmt
        stream.gop_size = gop
        stream.codec_context.time_base = base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        for i, moment in enumerate(moments):
            frame = av.VideoFrame.from_ndarray(draw_number(i, height, width), format="rgb24")
            frame.time_base = base
            frame.pts = round(moment / base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return [float(moment) for moment in moments]


def make_folder(root: Path, names: Sequence[str], **how) -> Path:
    """Writes a set `videos/NAME.mp4`, `labels/NAME.txt`; the caption is the name."""
    for name in names:
        write_numbered(root / "videos" / f"{name}.mp4", **how)
        label = root / "labels" / f"{name}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(f"clip {name}\n", encoding="utf-8")
    return root


def record_of(path: Path, **changes) -> ClipRecord:
    return ClipRecord(path.name, path.absolute(), ("a caption",), **changes)


_SPEC = {field.name for field in fields(SampleSpec)} - {"shapes"}


def dataset_of(records: Sequence[ClipRecord], *, shape: ClipShape, kind: type = VideoDataset, **options):
    """Returns a data set of one source and one shape.

    Args:
        records: The clips.
        shape: Shape of the samples.
        kind: Class of the data set.
        **options: Those of `SampleSpec` and of the data set; `shuffle` is the order's.
    """
    source = ClipSource("test", tuple(records), "")
    spec = SampleSpec((shape,), **{"fps": 8, **{name: options.pop(name) for name in _SPEC & options.keys()}})
    seed, shuffle = options.setdefault("seed", 1), options.pop("shuffle", True)
    return kind(
        sources=[source],
        order=GlobalOrder(seed=seed, clip_weights=[[1.0] * len(records)], shuffle=shuffle),
        buckets=one_bucket(shape, [source]),
        spec=spec,
        **options,
    )

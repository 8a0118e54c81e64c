"""Writes videos for people: mp4 files and contact sheets, complete or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image, ImageDraw
from torch import Tensor

from sat_train.errors import SatTrainError
from sat_train.log import get_logger

logger = get_logger(__name__)

# Below a CRF of 18 compression is hardly visible, and people look for artefacts of the model in these files.
# With mbtree, x264 reads memory that nobody has written: the same frames give other bytes each time.
_X264 = {"crf": "16", "x264-params": "mbtree=0"}
_CAPTION_HEIGHT = 16
_GAP = 2


def write_mp4(path: Path | str, video_tchw: Tensor, *, fps: float) -> None:
    """Writes an mp4 file with H.264 in yuv420p, which every player shows.

    If FFmpeg comes without libx264, it is MPEG-4 part 2, and a warning says so. Odd sizes, which yuv420p
    cannot hold, are made even by repeating the last row or column.

    Args:
        path: File to write; its folder is created.
        video_tchw: uint8 RGB frames.
        fps: Frames per second.

    Raises:
        SatTrainError: The file cannot be written.
    """
    frames_thwc = _even_size(video_tchw).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    with _complete_or_absent(Path(path)) as partial, av.open(str(partial), "w", format="mp4") as container:
        codec = _codec()
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames_thwc.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = _X264 if codec == "libx264" else {"qscale": "2"}
        for frame_hwc in frames_thwc:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_hwc, format="rgb24")))
        container.mux(stream.encode(None))


def write_contact_sheet(
    path: Path | str, videos: Sequence[Tensor], captions: Sequence[str], *, columns: int = 8
) -> None:
    """Writes a PNG with one row per video: its caption and evenly spaced frames, first and last included.

    Args:
        path: File to write; its folder is created.
        videos: uint8 RGB video_tchw, of any sizes.
        captions: One for each video, truncated to the width of the sheet.
        columns: Largest number of frames in a row.

    Raises:
        SatTrainError: The file cannot be written.
    """
    assert len(videos) == len(captions) > 0, f"{len(videos)} videos, {len(captions)} captions"
    rows = [_row(video, caption, columns) for video, caption in zip(videos, captions, strict=True)]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    with _complete_or_absent(Path(path)) as partial:
        sheet.save(partial, format="PNG")


def spread_frames(video_tchw: Tensor, columns: int = 8) -> Tensor:
    """Returns at most `columns` evenly spaced frames, first and last included."""
    frames = len(video_tchw)
    columns = min(columns, frames)
    return video_tchw[[round(column * (frames - 1) / max(columns - 1, 1)) for column in range(columns)]]


def _row(video_tchw: Tensor, caption: str, columns: int) -> Image.Image:
    from torchvision.transforms.functional import to_pil_image  # over a second, for runs with videos alone
    from torchvision.utils import make_grid

    frames_tchw = spread_frames(video_tchw, columns).cpu()
    frames = to_pil_image(make_grid(frames_tchw, nrow=columns, padding=_GAP, pad_value=255))
    row = Image.new("RGB", (frames.width, _CAPTION_HEIGHT + frames.height), "white")
    ImageDraw.Draw(row).text((_GAP, _GAP), " ".join(caption.split()), fill="black")
    row.paste(frames, (0, _CAPTION_HEIGHT))
    return row


def _even_size(video_tchw: Tensor) -> Tensor:
    height, width = video_tchw.shape[-2:]
    if height % 2 == 0 and width % 2 == 0:
        return video_tchw
    from torchvision.transforms.functional import pad

    padded: Tensor = pad(video_tchw, [0, 0, width % 2, height % 2], padding_mode="edge")
    return padded


def _codec() -> str:
    if "libx264" in av.codecs_available:
        return "libx264"
    logger.warning("this FFmpeg has no libx264: videos are written as MPEG-4 part 2")
    return "mpeg4"


@contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """Yields a temporary name next to `path`, and renames it when the file is written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise SatTrainError(
            f"{path} cannot be written: {error}",
            remedy="check the folder, its permissions and the free space",
        ) from error
    finally:
        with suppress(OSError):  # it must not hide why the file was not written
            partial.unlink(missing_ok=True)

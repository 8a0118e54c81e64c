"""Rotates and mirrors stored pictures so that they are shown upright."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
from av.sidedata.sidedata import Type
from av.video.frame import VideoFrame
from PIL import Image

from sat_train.data.clips.part_reader import ReadableFile

_EXIF_ORIENTATION = 0x0112
_EXIF_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


@dataclass(frozen=True)
class Orientation:
    """One of the eight orientations of a picture: rows and columns exchanged first, then each order reversed.

    Args:
        is_transposed: Whether rows become columns.
        is_flipped: Whether the rows are then reversed, top to bottom.
        is_mirrored: Whether the columns are then reversed, left to right.
    """

    is_transposed: bool = False
    is_flipped: bool = False
    is_mirrored: bool = False

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the shown height and width of a stored picture, or the reverse."""
        return (width, height) if self.is_transposed else (height, width)

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Returns a stored picture `[h, w, c]` as it is shown."""
        if self.is_transposed:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.is_flipped else 1, :: -1 if self.is_mirrored else 1]


_EXIF = {
    2: Orientation(is_mirrored=True),
    3: Orientation(is_flipped=True, is_mirrored=True),
    4: Orientation(is_flipped=True),
    5: Orientation(is_transposed=True),
    6: Orientation(is_transposed=True, is_mirrored=True),
    7: Orientation(is_transposed=True, is_flipped=True, is_mirrored=True),
    8: Orientation(is_transposed=True, is_flipped=True),
}


def read_exif(file: ReadableFile) -> Orientation:
    """Returns the orientation in a picture's EXIF data; upright by default.

    Pillow reads it, because PyAV gives the angle alone, which does not distinguish mirroring from rotation.
    """
    try:
        with Image.open(file, formats=_EXIF_FORMATS) as picture:  # type: ignore[arg-type]  # it only reads
            return _EXIF.get(picture.getexif().get(_EXIF_ORIENTATION), Orientation())
    except Exception:  # EXIF is optional: without any that Pillow understands, a picture is shown as stored
        return Orientation()


def frame_orientation(frame: VideoFrame) -> Orientation:
    """Returns the orientation in a video frame's display matrix, rounded to a right angle."""
    try:
        matrix = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]  # PyAV's types know texts
    except ValueError:  # PyAV does not know the type of some other side data of the frame
        return _from_angle(frame.rotation)
    return Orientation() if matrix is None else _from_matrix(bytes(matrix))


def _from_matrix(matrix: bytes) -> Orientation:
    """Returns the orientation of a matrix that sends a stored point (x, y), y downwards, to (a x + c y, b x +
    d y).
    """
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(is_flipped=d < 0, is_mirrored=a < 0)
    return Orientation(is_transposed=True, is_flipped=b < 0, is_mirrored=c < 0)


def _from_angle(degrees: float) -> Orientation:
    """Returns the orientation of a counterclockwise rotation."""
    turns = round(degrees / 90) % 4 if math.isfinite(degrees) else 0
    return (Orientation(), _EXIF[8], _EXIF[3], _EXIF[6])[turns]

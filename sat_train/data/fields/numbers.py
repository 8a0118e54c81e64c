"""Fields of numbers: arrays of the sample as a whole, and rows for its frames."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.fields.number_files import parse_numbers, read_numbers
from sat_train.data.fields.reader import FieldReader, SampleGeometry, repeat_last
from sat_train.data.sources.records import FieldPlace

_DOT = 2  # pixels from the middle to the edge of a point that is drawn
_DRAWN_POINTS = 4096  # of a frame
_COLOR = (40, 255, 80)


class NumbersField(FieldReader):
    """A field of numbers, which scale and crop may move."""

    def describe(self, place: FieldPlace) -> str:
        """Returns the shape of the array."""
        return f"[{', '.join(map(str, self._load(place).shape))}]"

    def _load(self, place: FieldPlace) -> np.ndarray:
        if place.value is not None:
            return parse_numbers(place.value, self.params.entry)
        return read_numbers(place.files[0], self.params.entry)

    def _place(self, numbers: np.ndarray, geometry: SampleGeometry) -> Tensor:
        """Returns numbers in the picture of the sample, float32.

        Raises:
            BadClip: Their last axis does not hold what `space` says.
        """
        params = self.params
        wanted = {"intrinsics": 4, "points": 2}.get(params.space, 0)
        width = numbers.shape[-1] if numbers.ndim else 0
        if width < wanted or (params.space == "intrinsics" and width != wanted):
            names = "fx, fy, cx, cy" if params.space == "intrinsics" else "x, y"
            raise BadClip("mismatch", f"its last axis has {width} numbers, not {names}")
        if params.moves:
            numbers = self._moved(numbers, geometry)
        return torch.from_numpy(np.ascontiguousarray(numbers, np.float32))

    def _moved(self, numbers: np.ndarray, geometry: SampleGeometry) -> np.ndarray:
        params, moved = self.params, numbers.astype(np.float64)
        height, width = params.size or geometry.crop.source
        first = 2 if params.space == "intrinsics" else 0
        if params.unit == "shares":
            moved[..., 0 : first + 2 : 2] *= width
            moved[..., 1 : first + 2 : 2] *= height
        if params.space == "intrinsics":
            across, down = geometry.scale(params.size)
            moved[..., 0] *= across
            moved[..., 1] *= down
        moved[..., first], moved[..., first + 1] = geometry.move(
            moved[..., first], moved[..., first + 1], size=params.size, center=params.origin == "center"
        )
        return moved


class PerFrameField(NumbersField):
    """Numbers of each frame of the clip's file, or at a rate of their own."""

    def read(self, place: FieldPlace, geometry: SampleGeometry) -> Tensor:
        """Returns the row of each frame of the sample, float32 [t, ...]."""
        rows = self._load(place)
        if not rows.ndim:
            raise BadClip("mismatch", "it is one number, not a row for each frame")
        indices = [self._row_at(moment, place.begins, geometry) for moment in geometry.times]
        if indices[-1] >= len(rows):
            raise BadClip(
                "mismatch", f"it has {len(rows)} rows, the last frame shown needs {indices[-1] + 1}"
            )
        return self._place(repeat_last(rows[indices], geometry.total), geometry)

    def _row_at(self, moment: float, begins: float, geometry: SampleGeometry) -> int:
        fps: float | None = self.params.fps
        if fps is not None:
            return max(0, math.ceil((moment - begins) * fps - 0.5))
        before = geometry.number_at(begins) if begins else 0
        return max(0, geometry.number_at(moment) - before)

    def views(self, value: Tensor, video_tchw: Tensor) -> tuple[Tensor, ...]:
        """Returns the clip with its points, if these are points in the sample's picture."""
        if self.params.space != "points":
            return ()
        points_tnc = value.flatten(1, -2) if value.dim() > 2 else value[:, None]
        middle = 0.5 if self.params.origin == "center" else 0.0
        return (_drawn(points_tnc[..., :2] + middle, video_tchw),)


class ArrayField(NumbersField):
    """Numbers of the sample as a whole."""

    def read(self, place: FieldPlace, geometry: SampleGeometry) -> Tensor:
        """Returns the array, float32 [...]."""
        return self._place(self._load(place), geometry)


def _drawn(points_tnc: Tensor, video_tchw: Tensor) -> Tensor:
    picture = video_tchw.clone()
    height, width = video_tchw.shape[-2:]
    color = torch.tensor(_COLOR, dtype=torch.uint8).view(3, 1, 1)
    for t, points in enumerate(points_tnc[:, :_DRAWN_POINTS].tolist()):
        for x, y in points:
            if 0 <= x < width and 0 <= y < height:
                left, top = max(0, int(x) - _DOT), max(0, int(y) - _DOT)
                picture[t, :, top : int(y) + _DOT + 1, left : int(x) + _DOT + 1] = color
    return picture

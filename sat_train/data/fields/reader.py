"""The base of all kinds of fields, and the geometry that a sample shares with its fields."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sat_train.config.parts.field_parts import FieldParams
from sat_train.data.clips.bad_clip import BadClip, one_clip
from sat_train.data.clips.resize import CoverCrop
from sat_train.data.sources.records import FieldPlace

_ROUNDING = 2  # pixels by which encoders and rounding change a side
_LEAST_S = 1e-3


@dataclass(frozen=True)
class SampleGeometry:
    """The part of a clip that a sample shows, in time and in the picture.

    Args:
        times: Time of each frame that was read, in seconds from the clip's first frame.
        total: Frames of the sample; where they are more than `times`, the last one is repeated.
        crop: Scale and crop of the frames.
        max_upscale: Largest factor by which a picture of its own may be enlarged.
        number_at: Returns the index in the clip's file of the frame at a time.
        deadline: `time.monotonic()` at which the sample is abandoned; None: never.
    """

    times: tuple[float, ...]
    total: int
    crop: CoverCrop
    max_upscale: float
    number_at: Callable[[float], int]
    deadline: float | None = None

    def seconds_left(self) -> float | None:
        """Returns the time that is left for the sample; None: any.

        Raises:
            BadClip: None is left.
        """
        if self.deadline is None:
            return None
        left = self.deadline - time.monotonic()
        if left < _LEAST_S:
            raise BadClip("timeout", "decoding takes longer than data.worker_timeout_s")
        return left

    def aligned_crop(self, height: int, width: int) -> CoverCrop:
        """Returns the clip's crop for a picture that shows the same, in any size.

        Raises:
            BadClip: Its aspect ratio is not the clip's.
        """
        own, other = (height, width), self.crop.source
        if min(abs(own[i] - own[1 - i] * other[i] / other[1 - i]) for i in (0, 1)) > _ROUNDING:
            raise BadClip(
                "mismatch",
                f"{height}x{width} (height x width) has not the aspect ratio of the clip, "
                f"{other[0]}x{other[1]}",
            )
        return self.crop

    def move(self, x: Any, y: Any, *, size: tuple[int, int] | None, center: bool) -> tuple[Any, Any]:
        """Returns where points of the clip's picture lie in the sample's, in pixels.

        Args:
            x: Horizontal positions, from the left.
            y: Vertical positions, from the top.
            size: Height and width of the picture they lie in; None: those of the clip.
            center: (0, 0) is the middle of the first pixel, not its corner.
        """
        across, down = self.scale(size)
        middle = 0.5 if center else 0.0
        return (
            (x + middle) * across - self.crop.left - middle,
            (y + middle) * down - self.crop.top - middle,
        )

    def scale(self, size: tuple[int, int] | None) -> tuple[float, float]:
        """Returns the factors on widths and heights of a picture of this size; None: that of the clip."""
        height, width = size or self.crop.source
        return self.crop.scaled_width / width, self.crop.scaled_height / height


class FieldReader:
    """Reads the values of one field. Base of all kinds.

    Args:
        params: Its settings.
    """

    def __init__(self, params: FieldParams) -> None:
        self.params: Any = params

    def read(self, place: FieldPlace, geometry: SampleGeometry) -> Any:
        """Returns the value for one sample: a tensor or a text.

        Raises:
            BadClip: It is missing, unreadable, or does not fit the clip.
        """
        raise NotImplementedError

    def describe(self, place: FieldPlace) -> str:
        """Returns a few words about the value of one clip, by which `data inspect` counts them.

        Raises:
            BadClip: It is missing or unreadable.
        """
        return ""

    def views(self, value: Any, video_tchw: Tensor) -> tuple[Tensor, ...]:
        """Returns videos for `data preview` that show the value, each uint8 [t, 3, h, w]; empty: none can.

        Args:
            value: From `read`.
            video_tchw: The clip's frames.
        """
        return ()


def repeat_last(values: np.ndarray, total: int) -> np.ndarray:
    """Repeats the last of `values` until there are `total`."""
    missing = total - len(values)
    return np.concatenate([values, np.repeat(values[-1:], missing, axis=0)]) if missing else values


def read_fields(
    readers: Mapping[str, FieldReader], places: Mapping[str, FieldPlace], geometry: SampleGeometry
) -> dict[str, Any]:
    """Reads all fields of one sample.

    Raises:
        BadClip: One is missing, unreadable, or does not fit the clip; it is named.
    """
    values = {}
    for name, reader in readers.items():
        with naming_field(name, places.get(name)):
            if name not in places:
                raise BadClip("missing", "the source has none")
            values[name] = reader.read(places[name], geometry)
    return values


@contextmanager
def naming_field(name: str, place: FieldPlace | None) -> Iterator[None]:
    """Names the field, and its files, in a `BadClip` raised inside."""
    try:
        with one_clip():
            yield
    except BadClip as error:
        where = f" ({place.name})" if place else ""
        raise BadClip(
            error.cause, f"its field `{name}`{where}: {error.detail}", may_pass=error.may_pass
        ) from None

"""Slot `field` (`data.fields.NAME`): values of a sample besides clip and caption, and the kinds that exist.

A builder gets the parameters, and returns a `FieldReader` (`sat_train/data/fields/reader.py`).
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

from pydantic import Field

from sat_train.config.parts.record import HeightWidth, Text, Whole
from sat_train.config.parts.registry import Choice, Params, part

Space = Literal["none", "intrinsics", "points", "poses"]
_ARRAYS = (".npy", ".npz", ".json", ".txt")


class FieldParams(Params):
    """Settings that every kind of field has.

    A kind says which `files` it reads: `video`, `image`, or suffixes with a dot; whether a cell of a table
    may hold the value itself (`inline`: a text, numbers, or only the path of a file); whether the value
    depends on the sample's moments (`timed`) and on its scale and crop (`framed`).
    """

    files: ClassVar[tuple[str, ...]] = ()
    inline: ClassVar[Literal["", "text", "numbers"]] = ""
    timed: ClassVar[bool] = False
    framed: ClassVar[bool] = False

    column: Text | None = Field(
        None, description="Column of a table, or folder next to videos/; null: the field's name."
    )

    @property
    def num_files(self) -> int:
        """Files of one sample."""
        return 1

    def planes(self, frames: int) -> int:
        """Returns the number of bytes a pixel that a sample of this many frames holds."""
        return 0


class FieldConfig(Choice):
    """A value of each sample besides clip and caption."""

    slot: ClassVar[str] = "field"
    key: ClassVar[str] = "kind"
    base = FieldParams

    kind: str = Field(description="What it is.")

    @property
    def settings(self) -> FieldParams:
        """Its settings, which stand next to `kind`."""
        return cast("FieldParams", self)


class TimedParams(FieldParams):
    """Settings of fields whose value follows the time of the clip."""

    timed: ClassVar[bool] = True

    begins: Literal["file", "part"] = Field(
        "file",
        description="Where in the clip its first frame or row belongs: to the first frame of the file, or of "
        "the part that `start` names.",
    )


@part("field", "video", build="sat_train.data.fields.pictures:VideoField")
class VideoFieldParams(TimedParams):
    """A video aligned with the clip, such as a control or a source: uint8 [t, 3, h, w]."""

    files = ("video", "image")
    framed = True

    def planes(self, frames: int) -> int:
        """Returns the number of bytes a pixel."""
        return 3 * frames


@part("field", "mask", build="sat_train.data.fields.pictures:MaskField")
class MaskFieldParams(TimedParams):
    """A mask aligned with the clip, a video or one image for all frames: uint8 0 or 1, [t, 1, h, w]."""

    files = ("video", "image")
    framed = True

    threshold: Whole = Field(
        128, ge=1, le=255, description="Least grey level of a pixel inside; 1: whatever is not black."
    )
    invert: bool = Field(False, description="Exchange inside and outside.")

    def planes(self, frames: int) -> int:
        """Returns the number of bytes a pixel."""
        return frames


@part("field", "image", build="sat_train.data.fields.pictures:ImageField")
class ImageFieldParams(FieldParams):
    """A picture, scaled and cropped to the sample's size by itself: uint8 [3, h, w]."""

    files = ("image", "video")
    framed = True

    def planes(self, frames: int) -> int:
        """Returns the number of bytes a pixel."""
        return 3


@part("field", "pair", build="sat_train.data.fields.pictures:PairField")
class PairFieldParams(TimedParams):
    """Videos that lost against the clip, aligned with it: uint8 [n, t, 3, h, w]."""

    files = ("video", "image")
    framed = True

    count: Whole = Field(1, ge=1, le=64, description="Videos of each sample; more in the data are refused.")

    @property
    def num_files(self) -> int:
        """Files of one sample."""
        return self.count

    def planes(self, frames: int) -> int:
        """Returns the number of bytes a pixel."""
        return 3 * frames * self.count


class NumbersParams(FieldParams):
    """Settings of fields of numbers."""

    files = _ARRAYS
    inline = "numbers"

    entry: Text | None = Field(
        None, description="Name of the array in an .npz or .json file; null: the only one."
    )
    space: Space = Field(
        "none",
        description="What moves with scale and crop. intrinsics: fx, fy, cx, cy in the last axis. points: "
        "x, y, and whatever follows. poses: cameras, which do not.",
    )
    unit: Literal["pixels", "shares"] = Field(
        "pixels", description="Unit of intrinsics and points: pixels, or shares of width and height."
    )
    origin: Literal["corner", "center"] = Field(
        "corner", description="Where (0, 0) lies: at the corner of the first pixel, or in its middle."
    )
    size: HeightWidth | None = Field(
        None, description="Height and width that intrinsics and points refer to; null: those of the clip."
    )

    @property
    def moves(self) -> bool:
        """True where scale and crop change the numbers."""
        return self.space in ("intrinsics", "points")


@part("field", "per_frame", build="sat_train.data.fields.numbers:PerFrameField")
class PerFrameFieldParams(NumbersParams, TimedParams):
    """Numbers of each frame, such as cameras or tracks: float32 [t, ...]."""

    framed = True

    fps: float | None = Field(
        None, gt=0, le=1000, description="Rows a second; null: one row for each frame of the clip's file."
    )


@part("field", "array", build="sat_train.data.fields.numbers:ArrayField")
class ArrayFieldParams(NumbersParams):
    """Numbers of the sample as a whole: float32 [...]."""

    framed = True


@part("field", "text", build="sat_train.data.fields.text_field:TextField")
class TextFieldParams(FieldParams):
    """A text besides the caption."""

    files = (".txt",)
    inline = "text"

"""Fields of pictures: aligned videos, masks, images and losing videos."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import ClipInfo, read_headers
from sat_train.data.clips.clip_times import HEADER_ROUNDING_S
from sat_train.data.clips.frames import open_frames
from sat_train.data.clips.resize import CoverCrop, cover_crop
from sat_train.data.fields.reader import FieldReader, SampleGeometry, repeat_last
from sat_train.data.sources.records import FieldFile, FieldPlace

_LUMA = (299, 587, 114)  # thousandths of red, green and blue in a grey level (ITU-R BT.601)
_TINT = (255, 32, 32)


class PictureField(FieldReader):
    """A field that is read from videos or images."""

    def describe(self, place: FieldPlace) -> str:
        """Returns the sizes and rates of its files."""
        infos = (read_headers(file.path, span=file.span) for file in place.files)
        return " and ".join(sorted({_describe(info) for info in infos}))


class VideoField(PictureField):
    """A video that shows what the clip shows, frame by frame."""

    def read(self, place: FieldPlace, geometry: SampleGeometry) -> Tensor:
        """Returns its frames at the clip's own times, uint8 [t, 3, h, w]."""
        return to_tensor(read_aligned(place.files[0], place, geometry))

    def views(self, value: Tensor, video_tchw: Tensor) -> tuple[Tensor, ...]:
        """Returns the field itself."""
        return (value,)


class MaskField(PictureField):
    """The pixels of something, frame by frame."""

    def read(self, place: FieldPlace, geometry: SampleGeometry) -> Tensor:
        """Returns the mask at the clip's own times, uint8 0 or 1, [t, 1, h, w]."""
        frames_thwc = read_aligned(place.files[0], place, geometry, nearest_pixel=True)
        grey_thw = (frames_thwc @ np.array(_LUMA, np.int64) + 500) // 1000
        inside = (grey_thw >= self.params.threshold) != self.params.invert
        return torch.from_numpy(inside.astype(np.uint8))[:, None]

    def views(self, value: Tensor, video_tchw: Tensor) -> tuple[Tensor, ...]:
        """Returns the clip, red inside."""
        tint = torch.tensor(_TINT, dtype=torch.uint8).view(3, 1, 1)
        return (torch.where(value.bool(), video_tchw // 2 + tint // 2, video_tchw),)


class ImageField(PictureField):
    """A picture that goes with the clip but shows something else, such as a reference."""

    def read(self, place: FieldPlace, geometry: SampleGeometry) -> Tensor:
        """Returns it, scaled and cropped to the sample's size by its own middle, uint8 [3, h, w]."""

        def choose_crop(height: int, width: int) -> CoverCrop:
            target = (geometry.crop.height, geometry.crop.width)
            return cover_crop(source=(height, width), target=target, max_upscale=geometry.max_upscale)

        file = place.files[0]
        with open_frames(file.path, span=file.span, timeout_s=geometry.seconds_left()) as reader:
            return to_tensor(reader.read([reader.info.first], choose_crop).video_thwc)[0]

    def views(self, value: Tensor, video_tchw: Tensor) -> tuple[Tensor, ...]:
        """Returns it, still."""
        return (value.expand_as(video_tchw),)


class PairField(PictureField):
    """Videos that lost against the clip."""

    def read(self, place: FieldPlace, geometry: SampleGeometry) -> Tensor:
        """Returns their frames at the clip's own times, uint8 [n, t, 3, h, w]."""
        return torch.stack([to_tensor(read_aligned(file, place, geometry)) for file in place.files])

    def views(self, value: Tensor, video_tchw: Tensor) -> tuple[Tensor, ...]:
        """Returns the videos."""
        return tuple(value)


def to_tensor(video_thwc: np.ndarray) -> Tensor:
    """Returns pictures with channels before height and width."""
    return torch.from_numpy(np.ascontiguousarray(video_thwc.transpose(0, 3, 1, 2)))


def read_aligned(
    file: FieldFile, place: FieldPlace, geometry: SampleGeometry, *, nearest_pixel: bool = False
) -> np.ndarray:
    """Reads a file at the clip's own times, with its scale and crop, uint8 RGB `[t, h, w, 3]`.

    Args:
        file: The file; an image stands for all frames.
        place: The field that it belongs to.
        geometry: The part of the clip that the sample shows.
        nearest_pixel: Scale without mixing colours, as masks need it.

    Raises:
        BadClip: It cannot be read, ends before the window does, or has another aspect ratio.
    """
    with open_frames(file.path, span=file.span, timeout_s=geometry.seconds_left()) as reader:
        info = reader.info
        moments = [max(info.first, info.first + moment - place.begins) for moment in geometry.times]
        if info.is_image:
            moments = [info.first] * len(moments)
        elif moments[-1] > info.last + 1 / info.rate + HEADER_ROUNDING_S:
            raise BadClip(
                "mismatch",
                f"it ends after {info.duration:.2f} s, the frames shown are at up to "
                f"{moments[-1] - info.first:.2f} s",
            )
        frames = reader.read(moments, geometry.aligned_crop, nearest_pixel=nearest_pixel)
    return repeat_last(frames.video_thwc, geometry.total)


def _describe(info: ClipInfo) -> str:
    size = f"{info.height}x{info.width}"
    return f"{size}, one image" if info.is_image else f"{size} at {info.rate:.3f}".rstrip("0").rstrip(".")

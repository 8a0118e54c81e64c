"""Scaling and colour conversion of one frame: FFmpeg's way, which the loader takes, and torchvision's."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from av import VideoFrame
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from sat_train.data.clips.orientation import Orientation
from sat_train.data.clips.resize import CoverCrop, cover_crop
from sat_train.data.clips.shaper import Shaper

TARGET = (480, 720)
_KR, _KB = 0.299, 0.114  # BT.601, which FFmpeg takes where a file says nothing

Way = Callable[[VideoFrame, CoverCrop], Tensor]


def run(samples: int) -> None:
    """Prints CPU time and error of each way."""
    for height, width in ((720, 1280), (1080, 1920)):
        crop = cover_crop(source=(height, width), target=TARGET, max_upscale=1)
        exact_chw = smooth_picture(height, width)
        frame, expected_chw = in_yuv420p(exact_chw.permute(1, 2, 0).numpy()), fitted(exact_chw, crop)
        for name, way in WAYS.items():
            start = time.process_time()
            for _ in range(samples):
                picture_chw = way(frame, crop)
            milliseconds = (time.process_time() - start) / samples * 1e3
            error = picture_chw.double() - expected_chw
            print(
                f"resize {height}p  {name:32} {milliseconds:6.2f} ms of CPU a frame, mean error "
                f"{error.mean():+.2f}, root mean square {error.square().mean().sqrt():.2f} of 255 levels"
            )


def smooth_picture(height: int, width: int) -> Tensor:
    """Returns a picture without edges, float64 `[3, h, w]` in [0, 255]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    red = 128 + 100 * np.sin(x / 97) * np.cos(y / 83)
    green = 128 + 90 * np.cos(x / 71 + 1)
    blue = 128 + 110 * np.sin(y / 59 + x / 150)
    return torch.from_numpy(np.stack([red, green, blue]))


def in_yuv420p(rgb_hwc: np.ndarray) -> VideoFrame:
    """Returns a picture as a decoder gives it, converted in float64."""
    height, width, _ = rgb_hwc.shape
    luma = rgb_hwc @ np.array([_KR, 1 - _KR - _KB, _KB])
    blue = (rgb_hwc[..., 2] - luma) / (2 - 2 * _KB)
    red = (rgb_hwc[..., 0] - luma) / (2 - 2 * _KR)
    half = (height // 2, 2, width // 2, 2)
    chroma = [np.round(128 + part.reshape(half).mean((1, 3)) * 224 / 255) for part in (blue, red)]
    frame = VideoFrame(width, height, "yuv420p")
    for plane, values in zip(frame.planes, (np.round(16 + luma * 219 / 255), *chroma), strict=True):
        padded = np.zeros((plane.height, plane.line_size), np.uint8)
        padded[:, : plane.width] = values
        plane.update(padded)
    return frame


def fitted(picture_chw: Tensor, crop: CoverCrop) -> Tensor:
    """Scales and crops as torchvision does."""
    size = [crop.scaled_height, crop.scaled_width]
    scaled = F.resize(picture_chw, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return F.crop(scaled, crop.top, crop.left, crop.height, crop.width)


def _ours(frame: VideoFrame, crop: CoverCrop) -> Tensor:
    shaper = Shaper((frame.height, frame.width), lambda height, width: crop, Orientation())
    return torch.from_numpy(shaper(frame).copy()).permute(2, 0, 1)


def _rgb(frame: VideoFrame) -> Tensor:
    return torch.from_numpy(VideoReformatter().reformat(frame, format="rgb24", threads=1).to_ndarray())


def _torchvision(frame: VideoFrame, crop: CoverCrop) -> Tensor:
    return fitted(_rgb(frame).permute(2, 0, 1), crop)


def _torchvision_after_full_chroma(frame: VideoFrame, crop: CoverCrop) -> Tensor:
    full = VideoReformatter().reformat(frame, format="yuv444p", interpolation="BICUBIC", threads=1)
    return fitted(_rgb(full).permute(2, 0, 1), crop)


WAYS: dict[str, Way] = {
    "FFmpeg scales, then RGB": _ours,
    "RGB, torchvision scales": _torchvision,
    "full chroma, RGB, torchvision": _torchvision_after_full_chroma,
}

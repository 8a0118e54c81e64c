"""First frames of a video to come: an image, or the beginning of a video file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.data.clips.bad_clip import BadClip, one_clip
from sat_train.data.clips.clip_file import VIDEO_SUFFIXES
from sat_train.data.clips.frames import open_frames
from sat_train.data.clips.resize import CoverCrop, cover_crop
from sat_train.errors import DataError
from sat_train.objective.given import as_samples, with_first_frames
from sat_train.sampling.build import SamplingSettings
from sat_train.sampling.prompts import SampleRequest, read_image

_MOST_ENLARGED = 8.0


def request_sample(request: SampleRequest, settings: SamplingSettings) -> VideoSample:
    """Returns a request as a sample, with the frames that its video begins with.

    Raises:
        DataError: Their file cannot be read.
    """
    if request.image is None:
        shape = (settings.num_frames, settings.height, settings.width)
        return as_samples([request.prompt], None, shape)[0]
    frames_tchw = read_first_frames(request.image, settings)
    return with_first_frames(request.prompt, frames_tchw, num_frames=settings.num_frames)


def read_first_frames(path: Path, settings: SamplingSettings) -> Tensor:
    """Reads the frames that a video begins with, scaled and cropped to its size.

    Args:
        path: An image, or a video, of which as many frames are taken as it has and the video to come takes.
        settings: Size, frames and frame rate of the video to come.

    Returns:
        uint8 RGB `[t, 3, h, w]`.

    Raises:
        DataError: The file cannot be read.
    """
    height, width = settings.height, settings.width
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        return read_image(path, height=height, width=width)[None]

    def crop(source_height: int, source_width: int) -> CoverCrop:
        source = (source_height, source_width)
        return cover_crop(source=source, target=(height, width), max_upscale=_MOST_ENLARGED)

    try:
        with one_clip(), open_frames(path) as reader:
            info = reader.info
            count = min(settings.num_frames, int((info.last - info.first) * settings.fps + 1e-6) + 1)
            frames = reader.read([info.first + i / settings.fps for i in range(count)], crop)
    except BadClip as error:
        raise DataError(f"{path}: {error.detail}", expected="a video that begins with these frames") from None
    return torch.from_numpy(frames.video_thwc).permute(0, 3, 1, 2).contiguous()

"""Section `data`: which frames of a clip are seen, and what happens to bad files."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sat_train.config.schema.record import HeightWidth, Record, Whole


class VideoDatasetParams(Record):
    """Clips with captions, as frames at a fixed rate and size."""

    video_size: HeightWidth = Field(description="Height and width in pixels of a training clip.")
    fps: float = Field(gt=0, description="Frames per second that the model sees, whatever the file's rate.")
    max_num_frames: Whole = Field(ge=1, description="Frames of a clip; 4k + 1.")
    skip_frms_num: Whole = Field(
        0, ge=0, description="Source frames left out at the start and end of each file."
    )
    window: Literal["head", "center", "random", "uniform", "chunks"] = Field(
        "random", description="Which part of a longer file is taken."
    )
    short_clip: Literal["error", "skip", "pad", "shrink"] = Field(
        "error", description="What to do with a file shorter than the window."
    )
    max_upscale: float = Field(
        2.0, ge=1, description="A file that would have to be enlarged more than this is refused."
    )


class VideoDatasetSlot(Record):
    """The data set of captioned video files."""

    target: Literal["VideoDataset"] = Field("VideoDataset", description="Kind of data set.")
    params: VideoDatasetParams = Field(description="Its settings.")


class DataConfig(VideoDatasetSlot):
    """What is read for training, and how."""

    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="Share of unreadable samples at which the run stops."
    )
    worker_timeout_s: float = Field(
        120.0, gt=0, description="A clip that takes longer to decode is given up."
    )

"""Section `data`: frames and sizes of clips, the cache of encoded samples, and limits on bad files."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from sat_train.config.parts.field_parts import FieldConfig
from sat_train.config.parts.record import (
    Aspects,
    HeightWidth,
    Ints,
    PlainName,
    Record,
    Sizes,
    Text,
    Whole,
    false_to_off,
)


class BucketsConfig(Record):
    """Shapes besides `video_size` and `max_num_frames`; each clip goes to the one that fits it best."""

    sizes: Sizes = Field((), description="More heights and widths in pixels.")
    aspects: Aspects = Field(
        (), description="More sizes, as `width:height` with about as many pixels as `video_size`."
    )
    frames: Ints = Field((), description="More lengths, below `max_num_frames`; 4k + 1.")
    max_tokens: Whole | None = Field(
        None,
        ge=1,
        description="A micro-batch of each shape has as many samples as fit into this; null: `batch_size`.",
    )


class VideoDatasetParams(Record):
    """Clips with captions, as frames at a fixed rate and size."""

    video_size: HeightWidth = Field(description="Height and width in pixels of a training clip.")
    fps: float = Field(
        gt=0, le=1000, description="Frames per second that the model sees, whatever the file's rate."
    )
    max_num_frames: Whole = Field(ge=1, le=100_001, description="Frames of a clip; 4k + 1.")
    skip_frms_num: Whole = Field(
        0, ge=0, description="Source frames left out at the start and end of each file."
    )
    window: Literal["head", "center", "random", "uniform", "chunks"] = Field(
        "random", description="Part of a longer file to use."
    )
    short_clip: Literal["error", "skip", "pad", "shrink"] = Field(
        "error", description="What to do with a file shorter than the window."
    )
    views: Whole | None = Field(
        None,
        ge=1,
        description="Windows and image noises of each clip, one an epoch, the same in every run; "
        "null: another for every sample.",
    )
    buckets: BucketsConfig | None = Field(
        None, description="Other shapes that samples may have; null: all have one."
    )
    max_upscale: float = Field(
        2.0, ge=1, description="A file that would have to be enlarged more than this is refused."
    )


class ColumnsConfig(Record):
    """Names of a table's columns, where they are not the usual ones."""

    video: Text | None = Field(None, description="Column of the file; null: `video` or a common name.")
    caption: Text | None = Field(None, description="Column of the text; null: `caption` or a common name.")
    image: Text | None = Field(None, description="Column of the conditioning image; null: `image`.")
    start: Text | None = Field(None, description="Column of the part's start in seconds; null: `start`.")
    end: Text | None = Field(None, description="Column of the part's end in seconds; null: `end`.")
    weight: Text | None = Field(None, description="Column of the weight in an epoch; null: `weight`.")


class DataConfig(Record):
    """Training data and how it is read."""

    params: VideoDatasetParams = Field(description="Captioned video files.")
    columns: ColumnsConfig = Field(
        ColumnsConfig(), description="Names of columns in manifests and Hugging Face datasets."
    )
    fields: dict[PlainName, FieldConfig] = Field(
        {}, description="Further values of each sample, by a name of your own: kind and its settings."
    )
    follow_links: bool = Field(False, description="Read files through links that lead out of a given folder.")
    cache: Annotated[Literal["off", "read", "require", "fill"], BeforeValidator(false_to_off)] = Field(
        "off",
        description="read: use what is cached, encode the rest. require: nothing else. fill: cache the rest.",
    )
    cache_dir: Text | None = Field(None, description="Folder of encoded samples.")
    cache_identity: Literal["content", "stat"] = Field(
        "content",
        description="Identity of a file. content: a hash of the bytes. stat: path, size, time of change.",
    )
    cache_shard_mb: float = Field(
        256.0,
        gt=0,
        le=1e6,
        description="Size at which encoded samples are published; a kill loses less than that.",
    )
    captions_at_once: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Captions that precompute gives T5 together. auto: 8 on a GPU, 1 on a CPU. A batch may "
        "be rounded differently.",
    )
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="Share of unreadable samples at which the run stops."
    )
    worker_timeout_s: float = Field(
        120.0, gt=0, le=1e6, description="A clip that takes longer to decode is given up."
    )

"""Small sets and caches for the tests."""

from __future__ import annotations

from pathlib import Path

import torch

from sat_train.config.shapes import ClipShape
from sat_train.data.batch import VideoSample
from sat_train.data.buckets import one_bucket
from sat_train.data.cache.file_metadata import FileMetadata
from sat_train.data.cache.index import CacheIndex
from sat_train.data.cache.key import EncoderDigests, SampleKeys
from sat_train.data.cache.samples import OpenCache, SampleCache
from sat_train.data.cache.shards import EntryInfo, ShardWriter
from sat_train.data.dataset import VideoDataset
from sat_train.data.sampler import GlobalOrder
from sat_train.data.sources.records import ClipSource
from tests.unit.data.videos import SIDE

ENCODERS = EncoderDigests(vae="vae of the tests", text="text encoder of the tests")


def open_dataset(
    folder: Path,
    records,
    *,
    use="read",
    encoder_digests=ENCODERS,
    image=None,
    identity="content",
    shape=None,
    **options,
) -> VideoDataset:
    """Returns a data set with a cache in `folder`; each epoch takes the clips as they are listed."""
    cache = OpenCache(
        folder, CacheIndex(folder), FileMetadata(folder, identity=identity), encoder_digests, use
    )
    shape = {"fps": 8, "max_upscale": 4.0, **(shape or {})}
    size = options.pop("video_size", (SIDE, SIDE))
    sources = [ClipSource("test", tuple(records), "")]
    order = GlobalOrder(seed=1, clip_weights=[[1.0] * len(records)], shuffle=False)
    return VideoDataset(
        sources=sources,
        order=order,
        buckets=one_bucket(ClipShape(options.pop("max_num_frames", 5), *size), sources),
        seed=options.pop("seed", 1),
        window=options.pop("window", "head"),
        cache=SampleCache(cache, image=image, **shape),
        **shape,
        **options,
    )


def keys_of(dataset: VideoDataset, index: int = 0) -> SampleKeys:
    return dataset.keys(index, dataset.order.clip_ref(index))


def tensors_of(number: int) -> dict[str, dict[str, torch.Tensor]]:
    """Returns what stands for the encodings of a sample: numbers that tell it from all others."""
    moments = {
        "mean": torch.full((2, 3, 4, 4), float(number)),
        "logvar": torch.full((2, 3, 4, 4), -float(number)),
    }
    return {
        "clip": moments,
        "image": {k: v[:1] + 0.5 for k, v in moments.items()},
        "text": {"text": torch.full((4, 8), 100.0 + number)},
    }


def keep(writer: ShardWriter, sample: VideoSample, number: int) -> None:
    """Adds the encodings of a sample that was read without the cache."""
    keys, made = sample.keys, tensors_of(number)
    writer.add(keys.clip, made["clip"], EntryInfo("clip", sample.clip_id, ENCODERS.vae, keys.clip_origin))
    writer.add(keys.text, made["text"], EntryInfo("text", sample.caption, ENCODERS.text))
    if keys.image is not None:
        writer.add(
            keys.image, made["image"], EntryInfo("image", sample.clip_id, ENCODERS.vae, keys.image_origin)
        )

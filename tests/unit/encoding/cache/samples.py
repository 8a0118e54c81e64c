"""Small sets and caches for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sat_train.config.shapes import ClipShape
from sat_train.data.dataset import SampleResult
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.index import CacheIndex, OpenCache
from sat_train.encoding.cache.key import EncoderDigests
from sat_train.encoding.cache.shards import ShardWriter
from sat_train.encoding.conditions.image import ImageCondition
from sat_train.encoding.conditions.text import TextCondition
from sat_train.encoding.encoded_dataset import EncodedDataset, UnencodedSample
from tests.unit.data.videos import SIDE, dataset_of

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
) -> EncodedDataset:
    """Returns a data set with a cache in `folder`; each epoch takes the clips as they are listed.

    `image` is the image condition: None for text-to-video, `noised` in training, `plain` in validation.
    """
    cache = OpenCache(
        folder, CacheIndex(folder), FileMetadata(folder, identity=identity), encoder_digests, use
    )
    noise = {name: options.pop(name) for name in ("noise_log_mean",) if name in options}
    size, frames = options.pop("video_size", (SIDE, SIDE)), options.pop("max_num_frames", 5)
    videos = dataset_of(
        records,
        shape=ClipShape(frames, *size),
        shuffle=False,
        training=image != "plain",
        **{"window": "head", "max_upscale": 4.0, **(shape or {}), **options},
    )
    text = TextCondition(null="zero", empty_prompt=lambda: torch.zeros(4, 8))
    images = [ImageCondition(scale=1.0, **noise)] if image else []
    return EncodedDataset(videos, cache, [text, *images])


def read(dataset: EncodedDataset, index: int) -> SampleResult:
    return dataset.videos.read(index, dataset.sample)


@dataclass(frozen=True)
class Keys:
    clip: str
    text: str
    image: str | None = None


def keys_of(dataset: EncodedDataset, index: int = 0) -> Keys:
    entries = dataset.entries(index, dataset.videos.order.clip_ref(index))
    return Keys(**{name: entry.key for name, entry in entries.items()})


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


def keep(writer: ShardWriter, sample: UnencodedSample, number: int) -> None:
    """Adds the encodings of a sample that was read without the cache."""
    for name, entry in sample.entries.items():
        writer.add(entry.key, tensors_of(number)[name], entry.info)

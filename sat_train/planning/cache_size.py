"""Size of a sample in the cache: its encodings are made on the meta device, where nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sat_train.config import RunConfig
from sat_train.config.parts.field_parts import FieldConfig
from sat_train.data.batches import VideoSample
from sat_train.data.sampler import AugmentationKey
from sat_train.encoding.build import build_conditions
from sat_train.encoding.conditions.condition import Condition
from sat_train.errors import SatTrainError
from sat_train.models.build import compute_dtype, encoder_dtype
from sat_train.models.encoders import Encoders
from sat_train.models.meta_models import build_meta_vae

_META = torch.device("meta")


@dataclass(frozen=True)
class ConditionBytes:
    """Encodings of `model.conditions` of one sample.

    Args:
        total: Their bytes.
        uncounted: Conditions whose encodings depend on values, on numbers of unknown shape, or on encoders of
            their own.
    """

    total: int
    uncounted: tuple[str, ...]


def count_clip_bytes(config: RunConfig) -> float:
    """Returns the bytes of the posterior's moments and of the caption's embedding of a clip."""
    spec, data = config.spec, config.require_data().params
    latent = spec.latent(data.max_num_frames, *data.video_size)
    moments = 2 * spec.out_channels * latent.height * latent.width
    frames = latent.frames + (1 if "image" in spec.conditions else 0)
    text = spec.text.max_length * spec.text_width * compute_dtype(config.args).itemsize
    return moments * frames * encoder_dtype(config.args).itemsize + text


def count_condition_bytes(config: RunConfig) -> ConditionBytes:
    """Counts what the conditions of `model.conditions` add to a sample in the cache."""
    total, uncounted = 0, []
    if config.model.conditions:
        encoders, sample = _meta_encoders(config), _meta_sample(config)
        for condition in build_conditions(config, encoders):
            if condition.name in config.model.conditions:
                count = _encoded_bytes(condition, sample, encoders)
                total += count or 0
                uncounted += [condition.name] if count is None else []
    return ConditionBytes(total, tuple(uncounted))


def _encoded_bytes(condition: Condition, sample: VideoSample, encoders: Encoders) -> int | None:
    if type(condition).load is not Condition.load or condition.encodes_text:
        return None
    try:
        return sum(tensor.nbytes for tensor in condition.encoded(sample, encoders).values())
    except (RuntimeError, SatTrainError):  # reads values, or numbers of a field
        return None


def _meta_encoders(config: RunConfig) -> Encoders:
    def no_text_encoder() -> Any:
        raise SatTrainError("a condition encodes text that it does not declare")

    return Encoders(
        load_vae=lambda: build_meta_vae(config),
        load_text_encoder=no_text_encoder,
        geometry=config.spec,
        dtype=compute_dtype(config.args),
        device=_META,
    )


def _meta_sample(config: RunConfig) -> VideoSample:
    data = config.require_data()
    frames, size = data.params.max_num_frames, data.params.video_size
    pixels = {name: _pixels(field, frames, size) for name, field in data.fields.items()}
    return VideoSample(
        clip_id="planned",
        sample_index=0,
        num_shown=frames,
        video_tchw=_bytes(frames, 3, *size),
        caption="",
        image_chw=None,
        augmentation=AugmentationKey(seed=0, number=0),
        fields={name: tensor for name, tensor in pixels.items() if tensor is not None},
    )


def _pixels(field: FieldConfig, frames: int, size: tuple[int, int]) -> Tensor | None:
    """Returns the value of a field of pictures; None for others."""
    shapes: dict[str, tuple[int, ...]] = {
        "video": (frames, 3),
        "mask": (frames, 1),
        "image": (3,),
        "pair": (getattr(field.settings, "count", 1), frames, 3),
    }
    return _bytes(*shapes[field.kind], *size) if field.kind in shapes else None


def _bytes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, device=_META)

"""Inputs of sampling: prompts as samples, their conditions, and the frames that a video continues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sat_train.config import Geometry
from sat_train.data.batches import VideoSample
from sat_train.data.sampler import AugmentationKey
from sat_train.encoding.conditions.condition import Condition, DitInputs, Encoding
from sat_train.encoding.conditions.randomness import PromptRandomness
from sat_train.encoding.encoded_batch import stack_rows
from sat_train.models.encoders import Encoders


def as_samples(
    prompts: Sequence[str | VideoSample], image_bchw: Tensor | None, shape: tuple[int, int, int]
) -> list[VideoSample]:
    """Returns prompts as samples for the conditions: each with a caption and, if given, a first frame.

    Args:
        prompts: Captions; a sample stays as it is.
        image_bchw: First frames.
        shape: Frames, height and width of the videos to come.
    """
    frames, height, width = shape
    none = torch.empty(len(prompts), 0, 3, height, width, dtype=torch.uint8)
    videos = none if image_bchw is None else image_bchw[:, None]
    return [
        with_first_frames(prompt, video, num_frames=frames) if isinstance(prompt, str) else prompt
        for prompt, video in zip(prompts, videos, strict=True)
    ]


def with_first_frames(prompt: str, frames_tchw: Tensor, *, num_frames: int) -> VideoSample:
    """Returns a prompt as a sample with the first frames of the video to come.

    Args:
        prompt: The caption.
        frames_tchw: uint8, of the size of the video.
        num_frames: Frames of the video.
    """
    key = AugmentationKey(0, 0)  # nothing about a prompt is augmented
    return VideoSample("sample", 0, num_frames, frames_tchw, prompt, None, key, training=False)


def shape_to_sample(
    geometry: Geometry, channels: int, shape: tuple[int, int, int]
) -> tuple[int, tuple[int, ...]]:
    """Returns the latent frames of a video to come, and the shape of its latent with the padding in front.

    Args:
        geometry: Sizes of patches and latent frames.
        channels: Channels of the latent.
        shape: Frames, height and width of the video.

    Raises:
        SatTrainError: They do not fit the model.
    """
    frames, height, width = shape
    geometry.check_size(height, width, subject="sample")
    geometry.check_frames(frames, subject="sample")
    latent = geometry.latent(frames, height, width)
    return latent.frames, (latent.padded_frames, channels, latent.height, latent.width)


def encode_samples(
    samples: Sequence[VideoSample], conditions: Sequence[Condition], encoders: Encoders
) -> dict[str, Encoding]:
    """Returns the encodings of samples by condition, batch first; sampling does without some."""
    encoded: dict[str, Encoding] = {}
    for condition in conditions:
        if condition.training_only:
            continue
        each = [condition.encoded(sample, encoders) for sample in samples]
        encoded[condition.name] = {
            part: stack_rows([own[part] for own in each]) for part in condition.tensors
        }
    return encoded


def sampling_inputs(
    conditions: Sequence[Condition],
    encoded: Mapping[str, Encoding],
    random: PromptRandomness,
    latent_shape: tuple[int, ...],
    *,
    with_null: bool,
) -> DitInputs:
    """Returns the inputs of prompts; with guidance, first those without the conditions that guide.

    Args:
        conditions: The conditions.
        encoded: Their encodings, batch first.
        random: Random numbers of the prompts.
        latent_shape: Of the latent, (b, t, c, h, w).
        with_null: Guidance needs the network without the conditions too.
    """
    every = torch.ones(latent_shape[0], dtype=torch.bool)
    null, full = [], []
    for condition in (each for each in conditions if each.name in encoded):
        own = encoded[condition.name]
        full.append(condition.inputs(own, random, latent_shape))
        null.append(full[-1])
        if with_null and condition.guides:
            device = next((tensor.device for tensor in own.values()), every.device)
            null[-1] = condition.inputs(condition.drop(own, every.to(device)), random, latent_shape)
    if not with_null:
        return DitInputs.merged(full)
    return DitInputs.cat([DitInputs.merged(null), DitInputs.merged(full)])


def encode_history(
    samples: Sequence[VideoSample], encoders: Encoders, geometry: Geometry, *, scale_factor: float
) -> Tensor | None:
    """Encodes the first frames of samples, for a law of the timesteps that keeps them clean.

    Args:
        samples: Samples with frames: of each as many as all have, the largest 4 k + 1 of them.
        encoders: The frozen models.
        geometry: Sizes of patches and latent frames.
        scale_factor: Latents are multiplied by this.

    Returns:
        Scaled latents with the padding that the videos have in front, `[b, t, c, h, w]`; None without frames.
    """
    given = min(len(sample.video_tchw) for sample in samples)
    if not given:
        return None
    count = given if geometry.has_whole_latents(given) else geometry.nearest_frames(given)[0]
    means = [encoders.video(each.video_tchw[:count], subject=each.clip_id)["mean"] for each in samples]
    given_btchw = scale_factor * torch.stack(means).float()
    padding = geometry.padding(geometry.latent_frames(samples[0].num_shown))
    return torch.cat([given_btchw[:, :1].expand(-1, padding, -1, -1, -1), given_btchw], dim=1)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode meanwhile."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)

"""Builds sampling settings from the sections `model` and `args`."""

from __future__ import annotations

from dataclasses import dataclass

from sat_train.config import RunConfig
from sat_train.diffusion.guidance import Guidance
from sat_train.diffusion.samplers import Sampler
from sat_train.errors import ConfigError, Fault


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling settings of a run, as `VideoDiffusion.generate` takes them.

    Args:
        num_frames: Pixel frames.
        height: In pixels.
        width: In pixels.
        steps: Denoising steps.
        guidance: Classifier-free guidance.
        sampler: The sampler.
        fps: Frames per second of the written file.
    """

    num_frames: int
    height: int
    width: int
    steps: int
    guidance: Guidance
    sampler: Sampler
    fps: float


def build_sampling(config: RunConfig) -> SamplingSettings:
    """Builds sampling settings: those of the model, and sizes under `args` or of training.

    Raises:
        ConfigError: No setting gives the size of a video.
    """
    args, spec = config.args, config.spec
    if args.sampling_num_frames is None:
        num_frames = spec.trained_frames
        if config.data is not None:
            num_frames = config.data.params.max_num_frames
    else:
        num_frames = spec.pixel_frames(args.sampling_num_frames)
    height, width = args.sampling_image_size or _trained_size(config)
    return SamplingSettings(
        num_frames=num_frames,
        height=height,
        width=width,
        steps=spec.sampling_steps,
        guidance=spec.guidance.build(),
        sampler=spec.sampler.build(),
        fps=config.sampling_fps,
    )


def _trained_size(config: RunConfig) -> tuple[int, int]:
    if config.data is None:
        expected = "a height and width in pixels, because there is no data section to take them from"
        raise ConfigError([Fault("args.sampling_image_size", "null", expected)])
    return config.data.params.video_size

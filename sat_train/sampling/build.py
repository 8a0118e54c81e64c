"""Builds sampling settings from the sections `model` and `args`."""

from __future__ import annotations

from dataclasses import dataclass

from sat_train.config import ModelSpec, RunConfig
from sat_train.config.schema.diffusion import ConstantGuidanceParams
from sat_train.diffusion.guidance import ConstantGuidance, DynamicGuidance, Guidance
from sat_train.errors import ConfigError, Fault
from sat_train.objective.video_diffusion import Sampler


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling settings of a run, as `VideoDiffusion.generate` takes them.

    Args:
        num_frames: Pixel frames.
        height: In pixels.
        width: In pixels.
        steps: Denoising steps.
        guidance: Classifier-free guidance.
        sampler: Name of the sampler.
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
    """Builds sampling settings: those under `args` if given, else those of model and training.

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
        steps=args.sampling_steps or spec.sampling_steps,
        guidance=build_guidance(spec, scale=args.guidance_scale),
        sampler=args.sampler or spec.sampler,
        fps=config.sampling_fps,
    )


def _trained_size(config: RunConfig) -> tuple[int, int]:
    if config.data is None:
        expected = "a height and width in pixels, because there is no data section to take them from"
        raise ConfigError([Fault("args.sampling_image_size", "null", expected)])
    return config.data.params.video_size


def build_guidance(spec: ModelSpec, *, scale: float | None = None) -> Guidance:
    """Builds the sampler's guidance; `scale` overrides its own."""
    params = spec.guidance
    scale = params.scale if scale is None else scale
    if isinstance(params, ConstantGuidanceParams):
        return ConstantGuidance(scale)
    return DynamicGuidance(scale, params.exp)

"""Generates one video from one prompt, for validation and for the command."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sat_train.objective.video_diffusion import Network, VideoDiffusion
from sat_train.sampling.build import SamplingSettings


def generate_video(
    pipeline: VideoDiffusion,
    settings: SamplingSettings,
    *,
    prompt: str,
    image_chw: Tensor | None,
    seed: int,
    network: Network | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generates one video.

    Args:
        pipeline: The models.
        settings: Sampling settings.
        prompt: The prompt.
        image_chw: uint8 first frame, for image-to-video; the video then has its size.
        seed: Seed of the noise.
        network: The engine around the transformer during training; None uses the pipeline's own network.
        progress: Called with (index of the finished step, steps).

    Returns:
        uint8 video_tchw on the CPU.

    Ranks: all that share the weights of the transformer.
    """
    height, width = (settings.height, settings.width) if image_chw is None else image_chw.shape[-2:]
    return pipeline.generate(
        [prompt],
        image_bchw=None if image_chw is None else image_chw[None],
        num_frames=settings.num_frames,
        height=height,
        width=width,
        steps=settings.steps,
        guidance=settings.guidance,
        sampler=settings.sampler,
        seeds=[seed],
        network=network,
        progress=progress,
    )[0]

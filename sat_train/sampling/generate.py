"""Generates one video, for validation and for the command."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.encoding.conditions.condition import Condition
from sat_train.encoding.conditions.text import others_encode_text
from sat_train.models.encoders import Encoders
from sat_train.objective.video_diffusion import Network, VideoDiffusion
from sat_train.sampling.build import SamplingSettings


def keep_captions(encoders: Encoders, conditions: Iterable[Condition], captions: Iterable[str]) -> bool:
    """Encodes the captions of all videos to come, and frees the text encoder where nothing else reads texts.

    Returns:
        Whether it was freed.
    """
    if others_encode_text(conditions):
        return False
    encoders.keep_texts(captions)
    return True


def generate_video(
    pipeline: VideoDiffusion,
    settings: SamplingSettings,
    *,
    prompt: str | VideoSample,
    image_chw: Tensor | None = None,
    seed: int,
    network: Network | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Generates one video.

    Args:
        pipeline: The models.
        settings: Sampling settings.
        prompt: The prompt, or a sample with all that conditions read of it; the video then has its shape.
        image_chw: uint8 first frame, for image-to-video; the video then has its size.
        seed: Seed of the noise.
        network: The engine around the transformer during training; None uses the pipeline's own network.
        progress: Called with (index of the finished step, steps).

    Returns:
        uint8 video_tchw on the CPU.

    Ranks: all that share the weights of the transformer.
    """
    num_frames, height, width = settings.num_frames, settings.height, settings.width
    if isinstance(prompt, VideoSample):
        num_frames = max(prompt.num_shown, len(prompt.video_tchw))
        height, width = prompt.video_tchw.shape[-2:]
    elif image_chw is not None:
        height, width = image_chw.shape[-2:]
    return pipeline.generate(
        [prompt],
        image_bchw=None if image_chw is None else image_chw[None],
        num_frames=num_frames,
        height=height,
        width=width,
        steps=settings.steps,
        guidance=settings.guidance,
        sampler=settings.sampler,
        seeds=[seed],
        network=network,
        progress=progress,
    )[0]

"""The validation videos of a run: prompts of the configuration, or held-out clips with all their fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sat_train.config import RunConfig
from sat_train.config.schema.args import IMAGE_SEPARATOR
from sat_train.data.batches import VideoSample
from sat_train.data.dataset import VideoDataset
from sat_train.data.loader import OrderedLoader
from sat_train.encoding.conditions.condition import Condition
from sat_train.log import get_logger
from sat_train.objective.video_diffusion import VideoDiffusion
from sat_train.sampling.build import SamplingSettings, build_sampling
from sat_train.sampling.prompts import build_requests, read_image

log = get_logger(__name__)

_CLIPS_SHOWN = 2  # without prompts and images


@dataclass(frozen=True)
class VideoToSample:
    """One validation video.

    Args:
        prompt: The prompt, or a held-out clip with its fields.
        image_chw: uint8 first frame of a prompt, for image-to-video.
        shown: Frames to show next to the video, uint8 [t, 3, h, w], by caption: the clip and its fields.
    """

    prompt: str | VideoSample
    image_chw: Tensor | None = None
    shown: tuple[tuple[str, Tensor], ...] = ()

    @property
    def caption(self) -> str:
        """The caption."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt.caption


def choose_videos(
    config: RunConfig, pipeline: VideoDiffusion, loader: OrderedLoader | None
) -> list[VideoToSample]:
    """Returns the validation videos; none where there is nothing to generate from.

    Prompts have no fields, and one first frame at most: where a condition reads a field, or the model
    continues given frames, held-out clips are sampled.
    """
    prompts, images = given_conditions(config, build_sampling(config))
    takes_image = config.model.noised_image_input
    reading = [each.name for each in _own_conditions(config, pipeline) if each.fields]
    lacking = "images" if takes_image and not images else ""
    lacking = "first frames" if pipeline.noising.has_levels else lacking
    lacking = f"the fields of {', '.join(reading)}" if reading else lacking
    if prompts and not lacking:
        return [
            VideoToSample(prompt, images[number] if takes_image else None)
            for number, prompt in enumerate(prompts)
        ]
    if loader is None:
        return []
    if prompts:
        log.info(
            "args.valid_prompts have no %s: validation videos show the validation clips instead", lacking
        )
    clips = [loader.dataset[index].sample for index in range(min(_CLIPS_SHOWN, loader.num_samples))]
    if _own_conditions(config, pipeline) or pipeline.noising.has_levels:
        return [VideoToSample(clip, shown=shown_fields(loader.dataset, clip)) for clip in clips]
    return [
        VideoToSample(clip.caption, clip.conditioning_image_chw() if takes_image else None) for clip in clips
    ]


def shown_fields(dataset: VideoDataset, clip: VideoSample) -> tuple[tuple[str, Tensor], ...]:
    """Returns the frames of a clip and of those of its fields that can be shown, by caption."""
    readers = dataset.fields
    fields = [
        (name, frames)
        for name, value in clip.fields.items()
        if name in readers
        for frames in readers[name].views(value, clip.video_tchw)
    ]
    return (*fields, (f"{clip.clip_id}, the clip itself", clip.video_tchw))


def given_conditions(config: RunConfig, settings: SamplingSettings) -> tuple[list[str], list[Tensor]]:
    """Returns `args.valid_prompts` and their first frames."""
    prompts, files = list(config.args.valid_prompts), config.args.valid_images
    if files:
        prompts = [f"{prompt}{IMAGE_SEPARATOR}{file}" for prompt, file in zip(prompts, files, strict=True)]
    if not any(IMAGE_SEPARATOR in prompt for prompt in prompts):
        return prompts, []
    lines = [(f"args.valid_prompts.{number}", prompt) for number, prompt in enumerate(prompts)]
    requests = build_requests(lines, image_to_video=True, image=None, seed=0)
    size = {"height": settings.height, "width": settings.width}
    return [r.prompt for r in requests], [read_image(r.image, **size) for r in requests if r.image]


def _own_conditions(config: RunConfig, pipeline: VideoDiffusion) -> Sequence[Condition]:
    """Returns the conditions of `model.conditions` that sampling uses."""
    return [
        each
        for each in pipeline.conditions
        if each.name in config.model.conditions and not each.training_only
    ]

"""Samples of pixels and batches of samples, as the loader returns them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sat_train.data.augmentation_key import AugmentationKey
from sat_train.data.batches import StepPosition


@dataclass(frozen=True)
class Sample:
    """Base of one sample, in any form.

    Args:
        clip_id: Name for messages.
        sample_index: Global position. Key of all randomness.
        num_shown: Frames that the clip gave; the rest repeats the last one.
    """

    clip_id: str
    sample_index: int
    num_shown: int

    def pin_memory(self) -> Sample:
        """Returns the sample in page-locked memory."""
        raise NotImplementedError


@dataclass(frozen=True)
class VideoSample(Sample):
    """One sample as pixels.

    Args:
        video_tchw: Pixels, uint8 RGB.
        caption: Caption.
        image_chw: Pixels of a given conditioning image, uint8; None: the first frame conditions the clip.
        augmentation: Key of everything random about its pixels.
        times: Time of each frame in its file, in seconds.
        training: Whether its conditions are augmented; off in validation and sampling.
    """

    video_tchw: Tensor
    caption: str
    image_chw: Tensor | None
    augmentation: AugmentationKey
    times: tuple[float, ...] = ()
    training: bool = True

    def conditioning_image_chw(self) -> Tensor:
        """Returns the image that conditions the clip: the given one, else the first frame."""
        return self.video_tchw[0] if self.image_chw is None else self.image_chw

    def generator(self, purpose: str) -> torch.Generator:
        """Returns the random generator for one purpose."""
        return self.augmentation.generator(purpose)

    def pin_memory(self) -> VideoSample:
        """Returns the sample in page-locked memory."""
        image = None if self.image_chw is None else self.image_chw.pin_memory()
        return replace(self, video_tchw=self.video_tchw.pin_memory(), image_chw=image)


class LoadedBatch(Protocol):
    """The interface of a batch for the training step and the loader."""

    @property
    def clip_ids(self) -> tuple[str, ...]:
        """Clip names, for messages."""

    @property
    def sample_indices(self) -> tuple[int, ...]:
        """Global positions, the key of all randomness."""

    def pin_memory(self) -> LoadedBatch:
        """Returns the batch in page-locked memory. PyTorch's loader calls this method by name."""

    def at(self, step_positions: tuple[StepPosition, ...]) -> LoadedBatch:
        """Returns the batch with the positions of its samples in their optimizer step."""


@dataclass(frozen=True)
class SampleBatch:
    """Samples that are taken together; not stacked, because each is encoded separately.

    Args:
        samples: The samples.
        step_positions: Position of each sample in its optimizer step; empty outside training.
    """

    samples: tuple[Sample, ...]
    step_positions: tuple[StepPosition, ...] = ()

    @property
    def clip_ids(self) -> tuple[str, ...]:
        """Clip names, for messages."""
        return tuple(sample.clip_id for sample in self.samples)

    @property
    def sample_indices(self) -> tuple[int, ...]:
        """Global positions, the key of all randomness."""
        return tuple(sample.sample_index for sample in self.samples)

    def pin_memory(self) -> SampleBatch:
        """Returns the batch in page-locked memory. PyTorch's loader calls this method by name."""
        return replace(self, samples=tuple(sample.pin_memory() for sample in self.samples))

    def at(self, step_positions: tuple[StepPosition, ...]) -> SampleBatch:
        """Returns the batch with the positions of its samples in their optimizer step."""
        return replace(self, step_positions=step_positions)

"""Identifies one augmentation of a clip: the key behind its window, crop and first-frame noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sat_train.distributed.seeds import derive_generator, derive_seed


@dataclass(frozen=True)
class AugmentationKey:
    """Key of everything random about a sample's pixels: window, crop, noise on its first frame.

    Args:
        seed: The run's seed; 0 where a clip has only a few views, which are the same in every run.
        number: Tells views apart: the global sample index, or a number made of clip and turn.
        turn: How often the clip was taken before, for windows that spread evenly over it.
    """

    seed: int
    number: int
    turn: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """Returns the random generator for one purpose."""
        return derive_generator(self.seed, purpose, self.number)


def limited_augmentation_key(
    size: int, start: float | None, end: float | None, visit: int, views: int
) -> AugmentationKey:
    """Returns the key of a clip's `visit`-th use, if it has only `views` of them.

    They follow each other, so that every one is shown equally often, and depend on the clip alone: another
    seed, another order, another name or folder, or more clips beside it meet the same ones. What is known of
    a file's contents without reading it is its size: enough to give each clip windows of its own.

    Args:
        size: Bytes of the clip.
        start: Begin of the part that is used, in seconds; None: the file's.
        end: End of the part; None: the file's.
        visit: How often the clip was taken before.
        views: How many views it has.
    """
    turn = visit % views
    return AugmentationKey(0, derive_seed(turn, f"view of {size} bytes, {start} to {end}"), turn)

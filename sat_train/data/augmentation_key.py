"""Identifies one augmentation of a clip: the key behind its window, crop and first-frame noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sat_train.distributed.seeds import derive_generator, derive_seed


@dataclass(frozen=True)
class AugmentationKey:
    """Key of everything random about a sample's pixels: window, crop, noise on its first frame.

    Args:
        seed: The run's seed; 0 if a clip has only a few views, which are the same in every run.
        number: Distinguishes views: the global sample index, or a number made of clip and turn.
        turn: Number of earlier uses of the clip, for windows that spread evenly over it.
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

    Views take turns, so that each is shown equally often. They depend on the clip alone, not on the seed, the
    order, the name, the folder or other clips. The size of a file is known without reading it, and is enough
    to give each clip its own windows.

    Args:
        size: Size of the clip in bytes.
        start: Start of the part to use, in seconds; None: that of the file.
        end: End of the part; None: that of the file.
        visit: Number of earlier uses of the clip.
        views: Number of its views.
    """
    turn = visit % views
    return AugmentationKey(0, derive_seed(turn, f"view of {size} bytes, {start} to {end}"), turn)

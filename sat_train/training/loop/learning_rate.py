"""The learning rate as a pure function of the step, so that nothing about it needs saving."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then constant, cosine or linear. Never negative.

    Args:
        peak: Highest rate, reached at the end of the warm-up.
        warmup_steps: Steps of the warm-up; its first step is `peak / warmup_steps`, not zero.
        style: `constant`, `cosine` or `linear`, after the warm-up.
        decay_end: Step at which the decay ends; the rate stays at `floor_ratio * peak` from there.
        floor_ratio: Lowest rate as a share of the highest, in [0, 1].
    """

    peak: float
    warmup_steps: int
    style: str
    decay_end: int
    floor_ratio: float

    def at(self, step: int) -> float:
        """Returns the rate of the optimizer step after `step` finished ones."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return self.peak * (self.floor_ratio + (1 - self.floor_ratio) * self._height(step))

    def _height(self, step: int) -> float:
        """Returns the height between floor and peak, in [0, 1]."""
        if self.style == "constant":
            return 1.0
        span = max(1, self.decay_end - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        if self.style == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        assert self.style == "linear", f"unknown style {self.style}"
        return 1 - progress


def warmup_steps(warmup: float, train_iters: int) -> int:
    """Returns the steps of a warm-up given as a share of the run (below 1) or as a number of steps."""
    return round(warmup * train_iters) if warmup < 1 else round(warmup)

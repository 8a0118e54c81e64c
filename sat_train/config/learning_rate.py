"""The learning rate as a pure function of the step, so that nothing about it needs saving."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sat_train.config.schema.args import ArgsConfig
from sat_train.config.values import show_rate


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then one of the shapes of `args.lr_decay_style`. Never negative.

    Args:
        peak: Highest rate, reached at the end of the warm-up.
        warmup_steps: Steps of the warm-up; its first step is `peak / warmup_steps`, not zero.
        style: Shape after the warm-up; a key of `SHAPES`.
        decay_end: Step at which the decay ends; the rate stays at `floor_ratio * peak` from there.
        floor_ratio: Lowest rate as a share of the highest, in [0, 1].
        power: Exponent of `polynomial`, positive.
        cycles: Number of cosines of `cosine_with_restarts`, at least 1.
        decay_share: Share of the steps up to `decay_end` in which `wsd` decays, in (0, 1].
    """

    peak: float
    warmup_steps: int
    style: str
    decay_end: int
    floor_ratio: float
    power: float = 2.0
    cycles: int = 1
    decay_share: float = 0.1

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
        return SHAPES[self.style](self, min(1.0, (step - self.warmup_steps) / span))

    def describe(self, train_iters: int) -> str:
        """Returns first, highest and last rate of a run in words, with their steps, which count from 1."""
        steps = {"first": 0, "peak": max(range(train_iters), key=self.at), "last": train_iters - 1}
        return ", ".join(
            f"{name} {show_rate(self.at(step))} at step {step + 1:,}" for name, step in steps.items()
        )


def _cosine(rate: LearningRate, progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _cosine_with_restarts(rate: LearningRate, progress: float) -> float:
    return 0.0 if progress == 1 else _cosine(rate, rate.cycles * progress % 1)


def _linear(rate: LearningRate, progress: float) -> float:
    return 1 - progress


def _polynomial(rate: LearningRate, progress: float) -> float:
    return float((1 - progress) ** rate.power)


def _wsd(rate: LearningRate, progress: float) -> float:
    """Warm-up, stable, decay: at the peak, until a decay by `1 - sqrt`.

    Source: Hagele et al. 2024 (arXiv:2405.18392) section 3, where this shape is the best.
    """
    span = max(1, rate.decay_end - rate.warmup_steps)
    share = min(1.0, rate.decay_share * rate.decay_end / span)
    return 1 - math.sqrt(max(0.0, 1 - (1 - progress) / share))


# Height between floor and peak, in [0, 1], at a progress in [0, 1] from the end of the warm-up to that of
# the decay.
SHAPES: dict[str, Callable[[LearningRate, float], float]] = {
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "linear": _linear,
    "polynomial": _polynomial,
    "wsd": _wsd,
}


def warmup_steps(warmup: float, train_iters: int) -> int:
    """Returns the steps of a warm-up given as a share of the run (below 1) or as a number of steps."""
    return round(warmup * train_iters) if warmup < 1 else round(warmup)


def build_learning_rate(args: ArgsConfig, train_iters: int) -> LearningRate:
    """Returns the learning rate of a run of this length."""
    return LearningRate(
        peak=args.lr,
        warmup_steps=warmup_steps(args.warmup, train_iters),
        style=args.lr_decay_style,
        decay_end=args.lr_decay_iters or train_iters,
        floor_ratio=args.lr_decay_ratio,
        power=args.lr_decay_power,
        cycles=args.lr_decay_cycles,
        decay_share=args.lr_decay_share,
    )

"""Reports of a run: records of a logged step, of a validation, and of validation videos."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sat_train.training.loop.clip_losses import ClipLosses, Estimate
from sat_train.training.loop.condition_losses import ConditionLosses


@dataclass(frozen=True)
class TrainMetrics:
    """One logged step.

    Args:
        step: Optimizer steps done.
        loss: Mean over the global batch of this step.
        loss_smoothed: Exponentially weighted mean of the losses of all steps.
        lr: Learning rate of this step.
        grad_norm: Norm of the whole gradient before clipping.
        step_time_s: Mean seconds per step since the last report, without saving and validating.
        data_wait_s: Seconds of it in which this rank waited for the loader.
        samples_per_s: Samples of all ranks together.
        peak_memory_gib: Most memory since start: of the device, or of the process on the CPU.
        skipped: Steps skipped so far because a gradient was not finite.
        tflops: FLOPs of the model a second on this rank, in 1e12, without what is recomputed.
        mfu: Share of the card's peak that they are; None for a card of unknown peak.
        measured: Numbers of the callbacks, by name, e.g. `bad_clips`.
    """

    step: int
    loss: float
    loss_smoothed: float
    lr: float
    grad_norm: float
    step_time_s: float
    data_wait_s: float
    samples_per_s: float
    peak_memory_gib: float
    skipped: int
    tflops: float = 0.0
    mfu: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """Frames that a view shows of a held-out clip.

    Args:
        view: The view.
        sample_index: Index of the clip.
        caption: Words to stand above them.
        frames_tchw: uint8 [t, 3, h, w], on the CPU.
    """

    view: str
    sample_index: int
    caption: str
    frames_tchw: Tensor


@dataclass(frozen=True)
class ValidationMetrics:
    """One validation.

    Args:
        step: Optimizer steps done.
        losses: Loss of each clip at each timestep.
        conditions: Losses with one condition replaced, of the conditions that are reported on.
        terms: Each term of the training loss by name, without its weight; empty where there is only one.
        views: Numbers of the views by clip, by `VIEW/NUMBER`.
        pictures: Pictures of the views.
    """

    step: int
    losses: ClipLosses
    conditions: tuple[ConditionLosses, ...] = ()
    terms: Mapping[str, ClipLosses] = field(default_factory=dict)
    views: Mapping[str, ClipLosses] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()

    @cached_property
    def valid_loss(self) -> Estimate:
        """Mean over clips and timesteps, with its interval."""
        return self.losses.mean()

    @cached_property
    def valid_loss_by_timestep(self) -> dict[int, Estimate]:
        """Mean over clips at each timestep, with its interval."""
        return self.losses.by_timestep()


@dataclass(frozen=True)
class BlockMetrics:
    """Norms of one step by block of the transformer.

    Args:
        step: Optimizer steps done.
        grad_norm_by_block: Norm of the gradient before clipping.
        update_ratio_by_block: Norm of the update, divided by that of the weights before it.
    """

    step: int
    grad_norm_by_block: dict[str, float]
    update_ratio_by_block: dict[str, float]


@dataclass(frozen=True)
class VideoMetrics:
    """Written validation videos.

    Args:
        step: Optimizer steps done.
        contact_sheet: PNG with one row per video.
        videos: MP4 files.
        captions: Prompt of each video.
    """

    step: int
    contact_sheet: Path
    videos: tuple[Path, ...]
    captions: tuple[str, ...]


NumberMetrics = TrainMetrics | ValidationMetrics | BlockMetrics
Metrics = NumberMetrics | VideoMetrics


def as_json(metrics: NumberMetrics) -> dict[str, Any]:
    """Returns metrics as a plain dictionary; numbers of callbacks are at the same level as the others."""
    if isinstance(metrics, ValidationMetrics):
        loss, by_timestep = metrics.valid_loss, metrics.valid_loss_by_timestep
        further: dict[str, Any] = {}
        if metrics.conditions:
            further["conditions"] = {each.name: each.as_json() for each in metrics.conditions}
        if metrics.views:
            further["views"] = {name: _view_json(numbers) for name, numbers in metrics.views.items()}
        return {
            "step": metrics.step,
            "valid_loss": loss.mean,
            "valid_loss_interval": [loss.low, loss.high],
            "valid_loss_by_timestep": {t: at.mean for t, at in by_timestep.items()},
            "valid_loss_interval_by_timestep": {t: [at.low, at.high] for t, at in by_timestep.items()},
            "valid_samples": len(metrics.losses),
            **{f"valid_loss/{name}": term.mean().mean for name, term in metrics.terms.items()},
            **further,
        }
    values = asdict(metrics)
    measured = values.pop("measured", {})
    return {**values, **measured}


def _view_json(numbers: ClipLosses) -> dict[str, Any]:
    mean = numbers.mean()
    by_timestep = {t: [at.mean, at.low, at.high] for t, at in numbers.by_timestep().items()}
    return {"mean": mean.mean, "interval": [mean.low, mean.high], "by_timestep": by_timestep}


def scalars(metrics: NumberMetrics) -> dict[str, float]:
    """Returns the numbers of metrics by tracker name, e.g. `train/loss`."""
    if isinstance(metrics, TrainMetrics):
        values = {f"train/{name}": value for name, value in as_json(metrics).items() if name != "step"}
        return {name: value for name, value in values.items() if value is not None}
    if isinstance(metrics, BlockMetrics):
        norms = {f"grad_norm/{block}": norm for block, norm in metrics.grad_norm_by_block.items()}
        ratios = {f"update_ratio/{block}": ratio for block, ratio in metrics.update_ratio_by_block.items()}
        return {**norms, **ratios}
    estimates = {"loss": metrics.valid_loss}
    estimates |= {f"loss_at_{t}": loss for t, loss in metrics.valid_loss_by_timestep.items()}
    estimates |= {f"loss/{name}": term.mean() for name, term in metrics.terms.items()}
    for condition in metrics.conditions:
        estimates |= {f"{condition.name}/true_minus_dropped": condition.over_dropped}
        if condition.over_shuffled is not None:
            estimates |= {f"{condition.name}/true_minus_shuffled": condition.over_shuffled}
    estimates |= {f"views/{name}": numbers.mean() for name, numbers in metrics.views.items()}
    means = {f"valid/{name}": loss.mean for name, loss in estimates.items()}
    limits = {f"valid_interval/{name}_low": loss.low for name, loss in estimates.items()}
    limits |= {f"valid_interval/{name}_high": loss.high for name, loss in estimates.items()}
    return {**means, **{name: limit for name, limit in limits.items() if math.isfinite(limit)}}

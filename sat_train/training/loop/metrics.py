"""Reports of a run: records of a logged step, of a validation, and of validation videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainMetrics:
    """One logged step.

    Args:
        step: Optimizer steps done.
        loss: Mean over the global batch of this step.
        loss_smoothed: Exponentially weighted mean of the losses of all steps.
        lr: Learning rate of this step.
        grad_norm: Norm of the whole gradient before clipping; None when the engine has none.
        step_time_s: Mean seconds per step since the last report, without saving and validating.
        data_wait_s: Seconds of it in which this rank waited for the loader.
        samples_per_s: Samples of all ranks together.
        peak_memory_gib: Most memory since start: of the device, or of the process on the CPU.
        skipped: Steps skipped so far because a gradient was not finite.
        measured: Numbers of the callbacks, by name, e.g. `bad_clips`.
    """

    step: int
    loss: float
    loss_smoothed: float
    lr: float
    grad_norm: float | None
    step_time_s: float
    data_wait_s: float
    samples_per_s: float
    peak_memory_gib: float
    skipped: int
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationMetrics:
    """One validation.

    Args:
        step: Optimizer steps done.
        valid_loss: Mean over clips and timesteps.
        valid_loss_by_timestep: Mean at each of the timesteps, by timestep.
        valid_samples: Number of clips.
    """

    step: int
    valid_loss: float
    valid_loss_by_timestep: dict[int, float]
    valid_samples: int


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


Metrics = TrainMetrics | ValidationMetrics | VideoMetrics


def as_json(metrics: TrainMetrics | ValidationMetrics) -> dict[str, Any]:
    """Returns metrics as a plain dictionary; numbers of callbacks are at the same level as the others."""
    values = asdict(metrics)
    measured = values.pop("measured", {})
    return {**values, **measured}


def scalars(metrics: TrainMetrics | ValidationMetrics) -> dict[str, float]:
    """Returns the numbers of metrics by tracker name, e.g. `train/loss`."""
    if isinstance(metrics, TrainMetrics):
        values = {f"train/{name}": value for name, value in as_json(metrics).items() if name != "step"}
    else:
        values = {"valid/loss": metrics.valid_loss}
        values |= {f"valid/loss_at_{t}": loss for t, loss in metrics.valid_loss_by_timestep.items()}
    return {name: value for name, value in values.items() if value is not None}

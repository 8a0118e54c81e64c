"""Progress display: a bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from sat_train.config.values import show_duration, show_rate
from sat_train.log import console, get_logger
from sat_train.training.callbacks.bad_clip_count import BAD_CLIPS
from sat_train.training.callbacks.loss_terms import TERM
from sat_train.training.loop.callback import Callback, Training
from sat_train.training.loop.clip_losses import Estimate
from sat_train.training.loop.condition_losses import ConditionLosses
from sat_train.training.loop.metrics import (
    BlockMetrics,
    Metrics,
    TrainMetrics,
    ValidationMetrics,
    VideoMetrics,
)

log = get_logger(__name__)

_COLUMNS = 80 - len("10:59:02 I ")  # of a terminal, after the log's prefix
_DETAILS_EVERY = 10  # lines
_SLOW_DATA = 0.1  # share of the step time from which waiting for data is reported


class PlainProgress(Callback):
    """Logs lines for each report, with the remaining time."""

    optional = True

    def __init__(self) -> None:
        self._lines = 0
        self._counts = (0, 0)
        self._last_validation: ValidationMetrics | None = None

    def started(self, trainer: Training) -> None:
        """Logs the steps to come."""
        self._train_iters = trainer.train_iters
        if trainer.state.step < trainer.train_iters:  # else only validation remained
            log.info("training steps %d to %d", trainer.state.step + 1, trainer.train_iters)

    def reported(self, metrics: Metrics) -> None:
        """Logs one line; at intervals, and when a step or clip was skipped, a second one with details."""
        if isinstance(metrics, VideoMetrics | BlockMetrics):
            return  # videos are logged when they are written, and blocks are too many for a log
        if isinstance(metrics, ValidationMetrics):
            for line in describe_validation(metrics, self._last_validation):
                log.info("%s", line)
            self._last_validation = metrics
            return
        counts = (metrics.skipped, int(metrics.measured.get(BAD_CLIPS, 0)))
        with_details = self._lines % _DETAILS_EVERY == 0 or counts != self._counts
        self._lines, self._counts = self._lines + 1, counts
        for line in describe(metrics, self._train_iters, with_details=with_details):
            log.info("%s", line)


class BarProgress(PlainProgress):
    """Shows a bar that advances with every step, below the lines."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None

    def started(self, trainer: Training) -> None:
        """Shows the bar."""
        super().started(trainer)
        columns = ("[bold]step", MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console(), transient=True)
        self._task: TaskID = self._bar.add_task("", total=trainer.train_iters, completed=trainer.state.step)
        self._bar.start()

    def step_done(self, trainer: Training) -> None:
        """Advances the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.state.step)

    def closed(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()


def describe_validation(metrics: ValidationMetrics, last: ValidationMetrics | None) -> list[str]:
    """Formats a validation, and its paired change since the last one, as lines that fit a terminal."""
    loss, clips = metrics.valid_loss, len(metrics.losses)
    limits = f" ({_loss(loss.low)} to {_loss(loss.high)})" if loss.has_interval else ""
    lines = [f"step {metrics.step}: validation loss {loss.mean:.5f}{limits} on {clips} clips"]
    lines += _describe_terms({name: losses.mean().mean for name, losses in metrics.terms.items()})
    change = None if last is None else metrics.losses.minus(last.losses).mean()
    if last is not None and change is not None and change.has_interval:
        mean, low, high = map(_change, (change.mean, change.low, change.high))
        lines.append(f"  since step {last.step} {mean} ({low} to {high})")
    lines += [line for each in metrics.conditions for line in _describe_condition(each)]
    return [*lines, *(f"  {name} {_estimate(each.mean())}" for name, each in metrics.views.items())]


def _describe_condition(losses: ConditionLosses) -> Iterator[str]:
    """Yields lines on what a condition is worth."""
    differences = {"another clip's": losses.over_shuffled, "none": losses.over_dropped}
    for instead, difference in differences.items():
        if difference is not None:
            yield f"  {losses.name}: true minus {instead} {_difference(difference)}"


def _estimate(estimate: Estimate) -> str:
    limits = f" ({_loss(estimate.low)} to {_loss(estimate.high)})" if estimate.has_interval else ""
    return f"{_loss(estimate.mean)}{limits}"


def _difference(estimate: Estimate) -> str:
    mean, low, high = map(_change, (estimate.mean, estimate.low, estimate.high))
    return f"{mean} ({low} to {high})" if estimate.has_interval else mean


def describe(metrics: TrainMetrics, train_iters: int, *, with_details: bool) -> list[str]:
    """Formats metrics as lines that fit a terminal of 80 columns.

    Args:
        with_details: Add numbers that change slowly: memory, speed, skipped steps and clips.
    """
    left_s = max(0, train_iters - metrics.step) * metrics.step_time_s
    waits = metrics.step_time_s > 0 and metrics.data_wait_s > _SLOW_DATA * metrics.step_time_s
    lr = f"lr {show_rate(metrics.lr)}"
    bad_clips = int(metrics.measured.get(BAD_CLIPS, 0))
    parts = [
        f"step {metrics.step}/{train_iters}",
        f"loss {_loss(metrics.loss)}",
        f"avg {_loss(metrics.loss_smoothed)}",
        lr,
        f"grad {metrics.grad_norm:.2g}",
        f"{_three_digits(metrics.step_time_s)} s/step",
        "" if metrics.mfu is None else f"mfu {metrics.mfu:.0%}",
        f"eta {show_duration(left_s)}",
    ]
    details = [
        f"skipped {metrics.skipped}" if metrics.skipped else "",
        f"bad clips {bad_clips}" if bad_clips else "",
        f"waiting for data {metrics.data_wait_s / metrics.step_time_s:.0%}" if waits else "",
        f"{_three_digits(metrics.samples_per_s)} samples/s",
        f"peak {metrics.peak_memory_gib:.1f} GiB",
    ]
    if len(" ".join(filter(None, parts))) > _COLUMNS:
        parts.remove(lr)
        details.insert(0, lr)
    terms = {n.removeprefix(TERM): x for n, x in metrics.measured.items() if n.startswith(TERM)}
    return [*_wrapped(parts), *_describe_terms(terms), *(_wrapped(details) if with_details else ())]


def _describe_terms(terms: Mapping[str, float]) -> Iterator[str]:
    """Yields lines on the terms of the loss, without their weights."""
    return _wrapped(["  terms:", *(f"{name} {_loss(loss)}" for name, loss in terms.items())] if terms else [])


def _loss(value: float) -> str:
    return f"{value:.3f}" if 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def _change(value: float) -> str:
    return f"{value:+.5f}" if abs(value) < 1000 else f"{value:+.3g}"


def _three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _wrapped(parts: Sequence[str]) -> Iterator[str]:
    line = ""
    for part in filter(None, parts):
        if line and len(line) + 1 + len(part) > _COLUMNS:
            yield line
            line = " "
        line = f"{line} {part}" if line else part
    if line.strip():
        yield line


def build_progress() -> Callback:
    """Returns the display that suits the terminal. Rank 0 only."""
    return BarProgress() if sys.stderr.isatty() else PlainProgress()

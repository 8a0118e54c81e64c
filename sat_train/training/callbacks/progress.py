"""What a person sees: a bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from sat_train.log import get_logger
from sat_train.training.callbacks.callback import Callback
from sat_train.training.entries import Entry, TrainEntry, ValidationEntry

if TYPE_CHECKING:
    from sat_train.training.trainer import Trainer

log = get_logger(__name__)


class PlainProgress(Callback):
    """One line an entry, with the time that is left."""

    def started(self, trainer: Trainer) -> None:
        """Says where the run begins and between which learning rates."""
        self._train_iters = trainer.train_iters
        first, last = trainer.state.step, max(trainer.state.step, trainer.train_iters - 1)
        rate = trainer.learning_rate
        log.info(
            "training steps %d to %d; learning rate %.3g first, %.3g highest, %.3g last",
            first + 1,
            trainer.train_iters,
            rate.at(first),
            rate.peak,
            rate.at(last),
        )

    def reported(self, entry: Entry) -> None:
        """Writes one line."""
        log.info("%s", describe(entry, self._train_iters))


class BarProgress(PlainProgress):
    """A bar that moves with every step, below the lines."""

    def started(self, trainer: Trainer) -> None:
        """Draws the bar."""
        super().started(trainer)
        columns = ("[bold]step", MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
        self._task: TaskID = self._bar.add_task("", total=trainer.train_iters, completed=trainer.state.step)
        self._bar.start()

    def step_done(self, trainer: Trainer) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=trainer.state.step)

    def reported(self, entry: Entry) -> None:
        """Writes one line above the bar."""
        self._bar.console.print(describe(entry, self._train_iters), highlight=False, markup=False)

    def closed(self) -> None:
        """Takes the bar away."""
        self._bar.stop()


def describe(entry: Entry, train_iters: int) -> str:
    """Returns one line for a person."""
    if isinstance(entry, ValidationEntry):
        return f"step {entry.step}: validation loss {entry.valid_loss:.5f} on {entry.valid_samples} clips"
    assert isinstance(entry, TrainEntry)
    parts = [
        f"step {entry.step}/{train_iters}",
        f"loss {entry.loss:.5f} (smoothed {entry.loss_smoothed:.5f})",
        f"lr {entry.lr:.3g}",
        f"grad {entry.grad_norm:.3g}" if entry.grad_norm is not None else "",
        f"{entry.step_time_s:.3f} s/step (data {entry.data_wait_s:.3f})",
        f"{entry.samples_per_s:.3g} samples/s",
        f"{entry.peak_memory_gib:.2f} GiB",
        f"skipped {entry.skipped}" if entry.skipped else "",
        f"bad clips {entry.bad_clips}" if entry.bad_clips else "",
        f"left {timedelta(seconds=math.ceil((train_iters - entry.step) * entry.step_time_s))}",
    ]
    return "  ".join(part for part in parts if part)


def build_progress() -> Callback:
    """Returns what suits the screen. For rank 0."""
    return BarProgress() if sys.stderr.isatty() else PlainProgress()

"""Checkpoints of a run: at intervals, at its end, and when it was asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sat_train.checkpoint.layout import PREEMPTED
from sat_train.checkpoint.retention import prune_checkpoints
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.files import write_text
from sat_train.log import get_logger
from sat_train.training.loop.callback import Callback, Training

log = get_logger(__name__)

_MOST_FAILURES_IN_A_ROW = 3


class BeginSave(Protocol):
    """Begins to save the trainer: `build_save`."""

    def __call__(self, trainer: Training, *, in_background: bool) -> Callable[[], Path]:
        """Returns a function that waits for the files, commits them and returns their folder. Ranks: all."""


class Checkpointer(Callback):
    """Saves every `interval` steps, at the end, and when the run is stopped.

    A save in the background is committed at the end of the first step in which no rank was writing any more,
    and before anything that has to find it: the next save, the end of the run.

    Args:
        mesh: The process mesh.
        run_directory: The run directory.
        save: Begins one checkpoint of the trainer, on all ranks.
        interval: Steps between checkpoints.
        keep_last: Number of newest checkpoints to keep; 0 keeps all.
        keep_every: Also keep checkpoints of steps divisible by this; 0 for none.
        in_background: Training continues while a checkpoint is written.
        finish_alone: Waits until the save in the background is committed without the other ranks, or lost.
        best_step: Returns the step with the lowest validation loss, which is kept; None if there is none.
    """

    def __init__(
        self,
        mesh: ProcessMesh,
        run_directory: Path,
        save: BeginSave,
        *,
        interval: int,
        keep_last: int,
        keep_every: int,
        in_background: bool = False,
        finish_alone: Callable[[], None] = lambda: None,
        best_step: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._mesh = mesh
        self._run_directory = run_directory
        self._save = save
        self._interval = interval
        self._keep_last, self._keep_every, self._best_step = keep_last, keep_every, best_step
        self._in_background, self._finish_alone = in_background, finish_alone
        self._begun: tuple[Training, int, Callable[[], Path]] | None = None
        self._saved_step = -1
        self._resumed_step: int | None = None
        self._failures_in_a_row = 0

    def started(self, trainer: Training) -> None:
        """Marks the resumed step as saved already."""
        if trainer.state.step:
            self._saved_step = self._resumed_step = trainer.state.step

    def step_done(self, trainer: Training) -> None:
        """Commits what has been written, and saves when a checkpoint is due."""
        is_last = trainer.complete or trainer.stopping
        is_due = is_last or trainer.state.step % self._interval == 0
        if is_due or not trainer.saving:
            self._commit_or_count()
        if not is_due:
            return
        try:
            self._save_once(trainer, in_background=self._in_background and not is_last)
        except CheckpointError as error:
            if is_last:
                raise
            self._count_failure(error)
        trainer.asked_to_stop()  # meanwhile: then neither validation nor another step is waited for

    def finished(self, trainer: Training) -> None:
        """Commits the last save, and saves where a validation was interrupted, or has ended the run, at an
        unsaved step.
        """
        self._commit_or_count()
        if trainer.state.step:
            self._save_once(trainer, in_background=False)

    def failed(self, error: BaseException) -> None:
        """Commits what was begun: all ranks together after an error of all, else rank 0 by itself."""
        if self._mesh.world_size == 1 or getattr(error, "ranks_agree", False):
            self._commit_or_count()
        elif isinstance(error, Exception):  # whoever presses Ctrl-C twice wants an end
            self._finish_alone()

    def _count_failure(self, error: CheckpointError) -> None:
        """Ends the run after several failed saves in a row: before that, a full disk may still be cleared."""
        self._failures_in_a_row += 1
        if self._failures_in_a_row == _MOST_FAILURES_IN_A_ROW:
            raise error
        if self._mesh.rank == 0:
            log.error("not saved, training continues: %s", error)

    def _save_once(self, trainer: Training, *, in_background: bool) -> None:
        if trainer.state.step == self._saved_step:
            return
        trainer.settle()
        trainer.callbacks.before_save(trainer)
        commit = self._save(trainer, in_background=in_background)
        self._begun = trainer, trainer.state.step, commit
        if not in_background:
            self._commit()

    def _commit_or_count(self) -> None:
        try:
            self._commit()
        except CheckpointError as error:
            self._count_failure(error)

    def _commit(self) -> None:
        if self._begun is None:
            return
        (trainer, step, commit), self._begun = self._begun, None
        folder = commit()
        self._saved_step = step
        self._failures_in_a_row = 0
        if self._mesh.rank == 0:
            log.info("saved %s", folder)
        trainer.callbacks.saved(step)
        if self._mesh.rank == 0:
            self._prune()

    def _prune(self) -> None:
        try:
            prune_checkpoints(
                self._run_directory,
                keep_last=self._keep_last,
                keep_every=self._keep_every,
                resumed_step=self._resumed_step,
                best_step=self._best_step(),
            )
        except CheckpointError as error:  # the new one is saved; old ones are deleted after the next
            log.warning("old checkpoints were not deleted: %s", error)


class PreemptedMarker(Callback):
    """Writes `PREEMPTED`, with the step, into the folder of a stopped run, for batch scripts. Rank 0 only.

    Args:
        run_directory: The run directory.
    """

    optional = True

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / PREEMPTED

    def started(self, trainer: Training) -> None:
        """Removes the marker of the previous start."""
        self._path.unlink(missing_ok=True)

    def finished(self, trainer: Training) -> None:
        """Writes the marker; the run is saved by now."""
        if trainer.stopping and not trainer.complete:
            write_text(self._path, f"{trainer.state.step}\n")

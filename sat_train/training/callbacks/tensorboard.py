"""TensorBoard files in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sat_train.training.callbacks.callback import Callback
from sat_train.training.entries import Entry, scalars

if TYPE_CHECKING:
    from sat_train.training.trainer import Trainer


class TensorBoard(Callback):
    """Writes scalars under `<run>/tensorboard`. For rank 0.

    Args:
        run_folder: The run's folder.
    """

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder / "tensorboard"

    def started(self, trainer: Trainer) -> None:
        """Opens the file; later steps of the run that goes on are hidden by `purge_step`."""
        from torch.utils.tensorboard import SummaryWriter  # here, since its import takes a second

        self._writer = SummaryWriter(str(self._folder), purge_step=trainer.state.step + 1)

    def reported(self, entry: Entry) -> None:
        """Writes the entry's numbers."""
        for name, value in scalars(entry).items():
            self._writer.add_scalar(name, value, entry.step)

    def closed(self) -> None:
        """Closes the file."""
        self._writer.close()

"""Weights & Biases, for those who have it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sat_train.errors import LaunchError
from sat_train.training.callbacks.callback import Callback
from sat_train.training.entries import Entry, scalars

if TYPE_CHECKING:
    from sat_train.training.trainer import Trainer

_ID_FILE = "wandb_id"


class WeightsAndBiases(Callback):
    """Reports to Weights & Biases; a run that goes on continues its page. For rank 0.

    Args:
        run_folder: The run's folder; its name is the run's name.
        project: `args.wandb_project_name`.
        config: The resolved configuration.

    Raises:
        LaunchError: The package is not installed.
    """

    def __init__(self, run_folder: Path, *, project: str, config: dict[str, Any]) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise LaunchError(
                "args.wandb = true, but the package wandb is not installed",
                remedy="pip install 'sat_train[wandb]', or set args.wandb: false",
            )
        self._run_folder, self._project, self._config = run_folder, project, config

    def started(self, trainer: Trainer) -> None:
        """Opens the page."""
        import wandb

        id_file = self._run_folder / _ID_FILE
        self._run = wandb.init(
            project=self._project,
            name=self._run_folder.name,
            id=id_file.read_text() if id_file.exists() else None,
            resume="allow",
            dir=str(self._run_folder),
            config=self._config,
        )
        id_file.write_text(self._run.id)
        # entries of one step may come one after another; an own step axis keeps them all
        self._run.define_metric("*", step_metric="step")

    def reported(self, entry: Entry) -> None:
        """Sends the entry's numbers."""
        self._run.log({"step": entry.step, **scalars(entry)})

    def finished(self, trainer: Trainer) -> None:
        """Closes the page."""
        self._run.finish()

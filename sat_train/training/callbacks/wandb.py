"""Weights & Biases, an optional dependency."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sat_train.config.parts.callback_parts import WeightsAndBiasesParams
from sat_train.errors import LaunchError
from sat_train.files import read_text, write_text
from sat_train.training.loop.callback import Callback, CallbackContext, Training
from sat_train.training.loop.metrics import Metrics, VideoMetrics, scalars

_ID_FILE = "wandb_id"
_MOST_ID_BYTES = 200


class WeightsAndBiases(Callback):
    """Reports numbers and validation videos to Weights & Biases; a resumed run continues its page.

    Rank 0 only.

    Args:
        run_directory: The run directory; its name is the run's name.
        project: `args.wandb_project_name`.
        config: The resolved configuration.

    Raises:
        LaunchError: The package is not installed.
    """

    optional = True

    def __init__(self, run_directory: Path, *, project: str, config: dict[str, Any]) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise LaunchError(
                "args.wandb = true, but the package wandb is not installed",
                remedy="pip install 'sat_train[wandb]', or set args.wandb: false",
            )
        self._run_directory, self._project, self._config = run_directory, project, config
        self._run: Any = None

    def started(self, trainer: Training) -> None:
        """Opens the page."""
        import wandb

        id_file = self._run_directory / _ID_FILE
        self._run = wandb.init(
            project=self._project,
            name=self._run_directory.name,
            id=read_text(id_file, limit=_MOST_ID_BYTES) if id_file.exists() else None,
            resume="allow",
            dir=str(self._run_directory),
            config=self._config,
        )
        write_text(id_file, self._run.id)
        # a step may have several reports; a separate step axis keeps them all
        self._run.define_metric("*", step_metric="step")

    def reported(self, metrics: Metrics) -> None:
        """Sends the numbers, or the videos."""
        if self._run is None:
            return  # the page could not be opened, which has been logged
        if isinstance(metrics, VideoMetrics):
            self._run.log({"step": metrics.step, **_media(metrics)})
        else:
            self._run.log({"step": metrics.step, **scalars(metrics)})

    def finished(self, trainer: Training) -> None:
        """Closes the page."""
        if self._run is not None:
            self._run.finish()


def _media(metrics: VideoMetrics) -> dict[str, Any]:
    import wandb

    videos = [
        wandb.Video(str(path), caption=caption, format="mp4")
        for path, caption in zip(metrics.videos, metrics.captions, strict=True)
    ]
    return {"valid/videos": videos, "valid/samples": wandb.Image(str(metrics.contact_sheet))}


def build(params: WeightsAndBiasesParams, context: CallbackContext) -> WeightsAndBiases:
    """Builds the callback of a run."""
    return WeightsAndBiases(context.folder(), project=params.project, config=context.config.shown_tree())

"""Pictures of validation views, next to the validation videos."""

from __future__ import annotations

from pathlib import Path

from sat_train.sampling.video_file import write_contact_sheet
from sat_train.training.callbacks.validation_videos import contact_sheet
from sat_train.training.loop.callback import Callback
from sat_train.training.loop.metrics import Metrics, ValidationMetrics


class ViewPictures(Callback):
    """Writes `samples/<step>/view_NAME.png`: a row for each clip, picture and timestep. Rank 0 only.

    Args:
        run_directory: The run directory.
    """

    optional = True

    def __init__(self, run_directory: Path) -> None:
        self._run_directory = run_directory

    def reported(self, metrics: Metrics) -> None:
        """Writes the pictures of a validation."""
        if not isinstance(metrics, ValidationMetrics):
            return
        for view in sorted({picture.view for picture in metrics.pictures}):
            own = [picture for picture in metrics.pictures if picture.view == view]
            write_contact_sheet(
                contact_sheet(self._run_directory, metrics.step).with_name(f"view_{view}.png"),
                [picture.frames_tchw for picture in own],
                [picture.caption for picture in own],
            )

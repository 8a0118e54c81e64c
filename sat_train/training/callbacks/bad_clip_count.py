"""Count of unusable clips; a run with too many of them ends."""

from __future__ import annotations

from sat_train.data.build import sum_bad_clips
from sat_train.data.loader import OrderedLoader
from sat_train.distributed.processes import ProcessMesh
from sat_train.training.loop.callback import Callback, Training

BAD_CLIPS = "bad_clips"


class BadClipCount(Callback):
    """Adds the number of bad clips, over all ranks, to the metrics.

    Args:
        mesh: The process mesh.
        loader: The loader of the training batches.
    """

    def __init__(self, mesh: ProcessMesh, loader: OrderedLoader) -> None:
        self._mesh, self._loader = mesh, loader

    def measure(self, trainer: Training) -> dict[str, float]:
        """Counts bad clips.

        Raises:
            DataError: More than `data.max_bad_fraction` of the set, on all ranks.

        Ranks: all.
        """
        return {BAD_CLIPS: sum_bad_clips(self._mesh, self._loader)}

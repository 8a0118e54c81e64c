"""`sat-train train` on a rank: the run, with what depends on its GPUs."""

from __future__ import annotations

from sat_train.config import RunConfig
from sat_train.distributed.processes import ProcessMesh
from sat_train.training import build


def train(config: RunConfig, mesh: ProcessMesh) -> None:
    """Trains a run.

    Ranks: all.
    """
    build.train(config, mesh, settle=_settle)


def _settle(config: RunConfig, mesh: ProcessMesh) -> RunConfig:
    from sat_train.planning.activations import settle_for_gpus  # counting takes a second to import

    return settle_for_gpus(config, mesh)

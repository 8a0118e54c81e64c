"""Config -> the saving of a run's checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sat_train.checkpoint.background import BackgroundWriter
from sat_train.checkpoint.manifest import BaseWeights, Manifest
from sat_train.checkpoint.run_state import RunState
from sat_train.checkpoint.save import begin_save, library_versions
from sat_train.config import RunConfig
from sat_train.distributed.collectives import on_rank_0
from sat_train.distributed.environment import RankEnv
from sat_train.distributed.processes import ProcessMesh
from sat_train.models.build import compute_dtype
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.training.callbacks.checkpoint import BeginSave
from sat_train.training.loop.callback import Training
from sat_train.training.models import StartWeights
from sat_train.training.resume import CALLBACKS_KEY, CONFIG_KEY, COUNTERS_KEY, PART_FILES_KEY, RATE_KEY
from sat_train.training.run_data import RunData
from sat_train.training.run_directory import RunDirectory
from sat_train.weights.names import dtype_name


def build_save(
    config: RunConfig,
    mesh: ProcessMesh,
    run_directory: RunDirectory,
    data: RunData,
    start: StartWeights,
    dit: DiffusionTransformer,
    writer: BackgroundWriter,
) -> BeginSave:
    """Returns a function that begins a trainer's checkpoint; call it on all ranks."""
    left_out, base_weights = start.left_out(dit, model_size=mesh.model_size), start.base

    def check_held() -> None:
        if run_directory.lock is not None:
            run_directory.lock.check_held()

    def save(trainer: Training, *, in_background: bool) -> Callable[[], Path]:
        assert run_directory.folder is not None, "only a run with a folder saves"
        on_rank_0(mesh, check_held)
        consumed = data.train.position.consumed
        assert consumed == trainer.state.samples_consumed, "the loader and the loop disagree"
        client_state = {
            **trainer.state.client_state(),
            CONFIG_KEY: config.shown_tree(),
            COUNTERS_KEY: trainer.engine.counters(),
            PART_FILES_KEY: dict(data.part_files),
            RATE_KEY: trainer.learning_rate.at(trainer.state.step),
            CALLBACKS_KEY: trainer.callbacks.state_dict(),
        }
        return begin_save(
            mesh,
            writer=writer if in_background else None,
            state=RunState(
                weights=trainer.engine.weights(left_out=left_out),
                pieces=trainer.engine.pieces(left_out=left_out),
                fragments=trainer.callbacks.add_tensors(trainer.engine.fragments()),
                client_state=client_state,
            ),
            run_directory=run_directory.folder,
            manifest=_describe(config, mesh, data, trainer.state.step, base_weights),
            check_held=check_held,
        )

    return save


def _describe(
    config: RunConfig, mesh: ProcessMesh, data: RunData, step: int, base_weights: BaseWeights | None
) -> Manifest:
    """Returns the manifest of the next checkpoint, without its files."""
    position = data.train.position
    return Manifest(
        step=step,
        samples_consumed=position.consumed,
        samples_waiting=position.waiting,
        world_size=mesh.world_size,
        data_size=mesh.data_size,
        model_size=mesh.model_size,
        dtype=dtype_name(compute_dtype(config.args)),
        trainable_only=base_weights is not None,
        config_digest=config.digest(),
        data_fingerprint=data.train.fingerprint,
        base_weights=base_weights,
        versions=library_versions(),
    )


def build_background_writer(config: RunConfig) -> BackgroundWriter:
    """Builds the writer of `args.async_save`."""
    ranks_here = RankEnv.read().local_world_size
    return BackgroundWriter(only_with_room=config.args.async_save == "auto", ranks_here=ranks_here)

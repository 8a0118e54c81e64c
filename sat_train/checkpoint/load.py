"""Loading a training run, strictly: what was saved goes back where it came from, or nothing is touched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat_train.checkpoint.consolidate import read_model_states
from sat_train.checkpoint.engine_io import (
    ShardFiles,
    load_engine,
    optimized_shapes,
    read_shard,
    saved_shapes,
)
from sat_train.checkpoint.find import ResumePoint
from sat_train.checkpoint.layout import ema_file_name, step_folder
from sat_train.checkpoint.manifest import BaseWeights, Manifest
from sat_train.checkpoint.names import check_names_and_shapes
from sat_train.checkpoint.reshard import ReshardedFiles
from sat_train.distributed.collectives import gather_objects
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class ResumeState:
    """Where the run stands.

    Args:
        step: Optimizer steps done.
        samples_consumed: Samples that all ranks together have taken.
        client_state: What was given to `save_training_checkpoint`.
        ema_state: This rank's part of the weight average; None when none was saved.
    """

    step: int
    samples_consumed: int
    client_state: dict[str, Any]
    ema_state: dict[str, Any] | None


def load_training_checkpoint(
    mesh: ProcessMesh, *, engine: Any, point: ResumePoint, base_weights: BaseWeights | None = None
) -> ResumeState:
    """Puts a verified checkpoint into a freshly built DeepSpeed engine.

    Args:
        engine: Engine over the same model and optimizer groups as the one that was saved; base weights are
            loaded already.
        point: From `find_resume_point`.
        base_weights: The frozen weights that this run loaded, for a checkpoint that left them out.

    Raises:
        CheckpointError: On all ranks alike: another model axis or ZeRO stage, other base weights, other
            names or shapes (listed).

    Ranks: all.
    """
    _check_same_layout(point, model_size=mesh.model_size, zero_stage=int(engine.zero_optimization_stage()))
    _check_same_base(point, base_weights)
    _check_same_parameters(mesh, engine, point)
    folder = step_folder(point.run_directory, point.step)
    client_state = load_engine(
        engine,
        run_directory=point.run_directory,
        step=point.step,
        exclude_frozen=point.manifest.trainable_only,
        files=_files(mesh, engine, point),
    )
    return ResumeState(
        step=point.step,
        samples_consumed=point.manifest.samples_consumed,
        client_state=client_state,
        ema_state=_read_ema(folder, point.manifest, mesh),
    )


def _files(mesh: ProcessMesh, engine: Any, point: ResumePoint) -> ShardFiles:
    manifest = point.manifest
    if manifest.data_size == mesh.data_size or manifest.zero_stage == 0:
        return ShardFiles()
    log.info("cutting the optimizer's state of %d data ranks for %d", manifest.data_size, mesh.data_size)
    return ReshardedFiles(
        engine,
        folder=step_folder(point.run_directory, point.step),
        manifest=manifest,
        data_rank=mesh.data_rank,
        data_size=mesh.data_size,
        model_rank=mesh.model_rank,
    )


def _check_same_layout(point: ResumePoint, *, model_size: int, zero_stage: int) -> None:
    manifest = point.manifest
    saved, ours = _layout(manifest.model_size, manifest.zero_stage), _layout(model_size, zero_stage)
    if saved != ours:
        raise CheckpointError(
            f"{step_folder(point.run_directory, point.step)} was written with {saved}, this run has {ours}",
            expected="the same: only the number of data ranks may change",
            remedy="set both back, or begin from its weights with args.load",
        )


def _layout(model_size: int, zero_stage: int) -> str:
    return f"args.model_parallel_size = {model_size} and args.zero_stage = {zero_stage}"


def _check_same_base(point: ResumePoint, ours: BaseWeights | None) -> None:
    saved = point.manifest.base_weights
    if saved is not None and ours is not None and saved.sha256 != ours.sha256:
        raise CheckpointError(
            f"step {point.step} of {point.run_directory} stands on base weights {saved.source} "
            f"(sha256 {saved.sha256[:12]}), and {ours.source} (sha256 {ours.sha256[:12]}) is loaded",
            expected="the same frozen weights",
            remedy=f"set args.load: {saved.source}",
        )


def _check_same_parameters(mesh: ProcessMesh, engine: Any, point: ResumePoint) -> None:
    """ZeRO's flat buffers carry no names: another order would load into wrong places without a word."""
    folder = step_folder(point.run_directory, point.step)
    saved = saved_shapes(read_model_states(folder, point.manifest, mesh.model_rank)[0])
    problem = ""
    ours = optimized_shapes(engine, exclude_frozen=point.manifest.trainable_only)
    try:
        check_names_and_shapes(_merged(ours), _merged(saved), where=str(folder))
        if [list(group) for group in ours] != [list(group) for group in saved]:
            raise CheckpointError(
                f"{folder}: the same parameters in another order or in other optimizer groups",
                expected="the optimizer groups of the run that wrote it",
                remedy="undo the change of the optimizer's settings, or begin from weights with args.load",
            )
    except CheckpointError as error:
        problem = str(error)
    first = next((other for other in gather_objects(mesh, problem) if other), "")
    if first:
        raise CheckpointError(first)


def _merged(groups: list[dict[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for group in groups for name, shape in group.items()}


def _read_ema(folder: Path, manifest: Manifest, mesh: ProcessMesh) -> dict[str, Any] | None:
    """Returns this rank's part of the average; with other data ranks, all parts of its slice of the model."""
    names = {record.name for record in manifest.files}
    if manifest.data_size == mesh.data_size:
        own = ema_file_name(mesh.rank)
        return read_shard(folder / own) if own in names else None
    ranks = [data_rank * manifest.model_size + mesh.model_rank for data_rank in range(manifest.data_size)]
    parts = [read_shard(folder / own) for rank in ranks if (own := ema_file_name(rank)) in names]
    if not parts:
        return None
    return {**parts[0], "fragments": [fragment for part in parts for fragment in part["fragments"]]}

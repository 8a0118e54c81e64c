"""Opens the state of a verified checkpoint for a resumed run, after comparing it with the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sat_train.checkpoint.find import ResumePoint
from sat_train.checkpoint.fragments import SavedFragments, read_fragments
from sat_train.checkpoint.layout import CLIENT_STATE, step_folder
from sat_train.checkpoint.manifest import BaseWeights
from sat_train.distributed.collectives import gather_objects
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.files import read_text, reading
from sat_train.weights.names import Shape, check_names_and_shapes

_MOST_BYTES = 64 * 2**20


def open_trained_state(
    mesh: ProcessMesh,
    *,
    point: ResumePoint,
    trained: Mapping[str, Shape],
    base_weights: BaseWeights | None = None,
) -> SavedFragments:
    """Opens the trained state of a checkpoint, whatever ranks and ZeRO stage wrote it.

    Args:
        mesh: The process mesh.
        point: From `find_resume_point`.
        trained: Names and shapes of this run's trained parameters, on this rank of the model axis.
        base_weights: The frozen weights that this run loaded, for a checkpoint without them.

    Raises:
        CheckpointError: On all ranks alike: other base weights, other names or shapes (listed), or damage.

    Ranks: all.
    """
    _check_same_base(point, base_weights)
    folder = step_folder(point.run_directory, point.step)
    fragments: SavedFragments | None = None
    problem = ""
    try:
        fragments = read_fragments(
            folder, point.manifest, model_rank=mesh.model_rank, model_size=mesh.model_size
        )
        check_names_and_shapes(trained, fragments.shapes, where=str(folder))
    except CheckpointError as error:
        problem = str(error)
    first = next((other for other in gather_objects(mesh, problem) if other), "")
    if first or fragments is None:
        raise CheckpointError(first)
    return fragments


def read_client_state(point: ResumePoint) -> dict[str, Any]:
    """Returns the client state that a checkpoint was saved with.

    Raises:
        CheckpointError: The file is not one that sat_train wrote.
    """
    path: Path = step_folder(point.run_directory, point.step) / CLIENT_STATE
    with reading(path, error=CheckpointError, expected="a checkpoint of `sat-train train`"):
        state = json.loads(read_text(path, limit=_MOST_BYTES))
        if not isinstance(state, dict):
            raise ValueError("it is not a JSON object")
    return state


def _check_same_base(point: ResumePoint, ours: BaseWeights | None) -> None:
    theirs = point.manifest.base_weights
    if theirs is not None and ours is not None and theirs.sha256 != ours.sha256:
        raise CheckpointError(
            f"step {point.step} of {point.run_directory} was trained on base weights {theirs.source} "
            f"(sha256 {theirs.sha256[:12]}), but {ours.source} (sha256 {ours.sha256[:12]}) is loaded",
            expected="the same frozen weights",
            remedy=f"set args.load: {theirs.source}",
        )

"""Saves a training run: its weights, its trained state, and its position."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import sat_train
from sat_train.checkpoint.background import BackgroundWriter
from sat_train.checkpoint.fragments import PIECE, Fragment, assemble, pack_fragments, read_fragment_file
from sat_train.checkpoint.in_flight import SaveInFlight
from sat_train.checkpoint.layout import (
    CLIENT_STATE,
    SAT_PREFIX,
    fragments_file_name,
    model_file_name,
    pieces_file_name,
)
from sat_train.checkpoint.manifest import Manifest
from sat_train.checkpoint.publish import RankReport, commit, expected_size, open_temporary, publish_files
from sat_train.checkpoint.run_state import RunState
from sat_train.checkpoint.torch_file import write_lazily, write_tensors
from sat_train.distributed.collectives import gather_objects
from sat_train.distributed.processes import ProcessMesh
from sat_train.files import FileRecord, HashingFile, reason_of, write_file
from sat_train.weights.lazy import LazyWeights

Exchange = Callable[[RankReport], Sequence[RankReport]]
Write = Callable[[HashingFile], None]


def save_training_checkpoint(
    mesh: ProcessMesh, *, state: RunState, run_directory: Path, manifest: Manifest
) -> Path:
    """Publishes everything that a run needs to resume as if it had never stopped.

    Args:
        state: The state of this rank.
        run_directory: The run directory.
        manifest: Description of the checkpoint, without its files; the same on all ranks.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: On all ranks alike. Training may continue; earlier checkpoints are intact.

    Ranks: all.
    """
    return begin_save(mesh, state=state, run_directory=run_directory, manifest=manifest)()


def begin_save(
    mesh: ProcessMesh,
    *,
    state: RunState,
    run_directory: Path,
    manifest: Manifest,
    writer: BackgroundWriter | None = None,
    check_held: Callable[[], None] = lambda: None,
) -> Callable[[], Path]:
    """Begins what `save_training_checkpoint` does; arguments and errors are the same.

    Args:
        writer: Writes a copy of the state in the background; None: the files are written before this returns.
        check_held: Called on rank 0 before the commit; raises if the run directory belongs to another run.

    Returns:
        A function for all ranks that waits for the files, commits the step and returns its folder, with the
        same errors.

    Ranks: all.
    """
    expected_bytes = expected_size(run_directory, _guess_bytes(mesh, state)) + _bytes_of_pieces(mesh, state)
    temporary = open_temporary(mesh, run_directory, step=manifest.step, expected_bytes=expected_bytes)
    client_state = json.dumps(state.client_state, indent=1, sort_keys=True) + "\n"
    write = partial(_write_rank, mesh, temporary, client_state)
    publish = partial(publish_files, temporary, run_directory, manifest, check_held)
    if writer is None:
        report = write(partial(gather_objects, mesh), state)
        return lambda: commit(mesh, publish, report)
    save = writer.in_flight = SaveInFlight(mesh, temporary.name, publish)
    wait = writer.start(state, partial(write, save.exchange))
    return lambda: commit(mesh, save.publish, wait())


def _write_rank(
    mesh: ProcessMesh, folder: Path, client_state: str, exchange: Exchange, state: RunState
) -> RankReport:
    """Writes this rank's files; reports a failure instead of raising, because the other ranks wait for it.

    Where each rank holds pieces of the weights, the first data rank puts SAT's file together: from its own
    pieces, and from files that the other ranks write for it.

    Args:
        exchange: Returns the reports of the ranks whose pieces this one needs, once they are written.
    """
    passed = _write_all(folder, _passed_on(mesh, state))
    report = passed if passed.failure else _write_all(folder, _files(mesh, client_state, state))
    if state.pieces is None:
        return report
    failure = next((other.failure for other in exchange(report) if other.failure), "")
    if mesh.data_rank or report.failure:
        return report
    if failure:
        return RankReport(report.files, f"{model_file_name(mesh.model_rank)} lacks {failure}")
    merged = _merge(mesh, folder, state.pieces)
    return RankReport(report.files + merged.files, merged.failure)


def _write_all(folder: Path, files: Iterable[tuple[str, Write]]) -> RankReport:
    records: list[FileRecord] = []
    for name, write in files:
        try:
            records.append(write_file(folder / name, write))
        except Exception as error:
            return RankReport(records, f"{name}: {reason_of(error)}")
    return RankReport(records)


def _files(mesh: ProcessMesh, client_state: str, state: RunState) -> Iterator[tuple[str, Write]]:
    if state.weights is not None:
        module = {SAT_PREFIX + name: tensor for name, tensor in state.weights.items()}
        yield model_file_name(mesh.model_rank), partial(write_tensors, {"module": module})
    yield fragments_file_name(mesh.rank), partial(write_tensors, pack_fragments(state.fragments))
    if mesh.rank == 0:
        yield CLIENT_STATE, partial(_write_text, client_state)


def _passed_on(mesh: ProcessMesh, state: RunState) -> Iterator[tuple[str, Write]]:
    """Yields the file of the pieces that the first data rank needs; no part of the checkpoint."""
    if state.pieces is not None and mesh.data_rank:
        yield pieces_file_name(mesh.rank), partial(write_tensors, pack_fragments(state.pieces))


def _merge(mesh: ProcessMesh, folder: Path, own: Sequence[Fragment]) -> RankReport:
    """Writes the weights of this model rank from the pieces of all data ranks, whose files it removes."""
    name = model_file_name(mesh.model_rank)
    ranks = range(mesh.model_rank + mesh.model_size, mesh.world_size, mesh.model_size)
    paths = [folder / pieces_file_name(rank) for rank in ranks]
    report = _write_all(folder, [(name, partial(_write_merged, own, paths))])
    try:
        for path in paths:  # mapped no more: NFS keeps a file that somebody maps
            path.unlink()
    except OSError as error:
        return RankReport(failure=report.failure or f"{name}: {reason_of(error)}")
    return report


def _write_merged(own: Sequence[Fragment], paths: Sequence[Path], file: HashingFile) -> None:
    """Writes whole weights in the order of this rank's pieces, which hold the beginning of each."""
    others = [piece for path in paths for piece in read_fragment_file(path)]
    whole = assemble([*own, *others], PIECE, where="the weights of all ranks").tensors
    ordered = {SAT_PREFIX + piece.name: whole[piece.name] for piece in own}
    write_lazily("module", LazyWeights(ordered, where=""), file)


def _write_text(text: str, file: HashingFile) -> None:
    file.write(text.encode("utf-8"))


def library_versions() -> dict[str, str]:
    """Returns the versions of the libraries that write a checkpoint."""
    return {
        "sat_train": sat_train.__version__,
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
    }


def _guess_bytes(mesh: ProcessMesh, state: RunState) -> int:
    """Estimates the size of all files: weights are written once for each rank of the model axis."""
    runs = [run for fragment in state.fragments for run in fragment.tensors.values()]
    weights = mesh.model_size * sum(map(_num_bytes, (state.weights or {}).values()))
    return weights + _bytes_of_pieces(mesh, state) + mesh.world_size * sum(map(_num_bytes, runs))


def _bytes_of_pieces(mesh: ProcessMesh, state: RunState) -> int:
    """Estimates the bytes of all ranks' pieces, as if each had as many as this one."""
    pieces = [run for piece in state.pieces or () for run in piece.tensors.values()]
    return mesh.world_size * sum(map(_num_bytes, pieces))


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

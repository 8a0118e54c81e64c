"""Saves a training run: its weights, its trained state, and its position."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.serialization import get_crc32_options, set_crc32_options

import sat_train
from sat_train.checkpoint.background import BackgroundWriter
from sat_train.checkpoint.fragments import pack_fragments
from sat_train.checkpoint.in_flight import SaveInFlight
from sat_train.checkpoint.layout import CLIENT_STATE, SAT_PREFIX, fragments_file_name, model_file_name
from sat_train.checkpoint.manifest import Manifest
from sat_train.checkpoint.publish import RankReport, commit, expected_size, open_temporary, publish_files
from sat_train.checkpoint.run_state import RunState
from sat_train.distributed.processes import ProcessMesh
from sat_train.files import FileRecord, HashingFile, write_file


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
    expected_bytes = expected_size(run_directory, _guess_bytes(mesh, state))
    temporary = open_temporary(mesh, run_directory, step=manifest.step, expected_bytes=expected_bytes)
    client_state = json.dumps(state.client_state, indent=1, sort_keys=True) + "\n"
    write = partial(_write_rank, mesh, temporary, client_state)
    publish = partial(publish_files, temporary, run_directory, manifest, check_held)
    if writer is None:
        report = write(state)
        return lambda: commit(mesh, publish, report)
    save = writer.in_flight = SaveInFlight(mesh, temporary.name, publish)
    wait = writer.start(state, write)
    return lambda: commit(mesh, save.publish, wait())


def _write_rank(mesh: ProcessMesh, folder: Path, client_state: str, state: RunState) -> RankReport:
    """Writes this rank's files; reports a failure instead of raising, because the other ranks wait for it."""
    records: list[FileRecord] = []
    for name, write in _files(mesh, client_state, state):
        try:
            records.append(write_file(folder / name, write))
        except Exception as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else repr(error)[:300]
            return RankReport(files=records, failure=f"{name}: {reason}")
    return RankReport(files=records)


def _files(
    mesh: ProcessMesh, client_state: str, state: RunState
) -> Iterator[tuple[str, Callable[[HashingFile], None]]]:
    if state.weights is not None:
        module = {SAT_PREFIX + name: tensor for name, tensor in state.weights.items()}
        yield model_file_name(mesh.model_rank), partial(_write_tensors, {"module": module})
    yield fragments_file_name(mesh.rank), partial(_write_tensors, pack_fragments(state.fragments))
    if mesh.rank == 0:
        yield CLIENT_STATE, partial(_write_text, client_state)


def _write_tensors(content: dict[str, Any], file: HashingFile) -> None:
    with _saving_fast():
        torch.save(content, cast(IO[bytes], file))


class _Tags(threading.local):
    """Place of tensors that `torch.save` notes, in the thread that writes; empty: where they are."""

    place = ""


_tags = _Tags()
torch.serialization.register_package(0, lambda storage: _tags.place, lambda storage, location: None)


@contextmanager
def _saving_fast() -> Iterator[None]:
    """Leaves out torch's checksum, as there is a SHA-256, and copies from the GPU through pinned memory.

    Tensors are noted as lying on the CPU, so that a file does not depend on the device or on a copy.
    """
    from torch.utils.serialization import config

    checksums, pins = get_crc32_options(), config.save.use_pinned_memory_for_d2h
    set_crc32_options(False)
    config.save.use_pinned_memory_for_d2h = torch.cuda.is_available()
    _tags.place = "cpu"
    try:
        yield
    finally:
        _tags.place = ""
        set_crc32_options(checksums)
        config.save.use_pinned_memory_for_d2h = pins


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
    weights = (state.weights or {}).values()
    return mesh.model_size * sum(map(_num_bytes, weights)) + mesh.world_size * sum(map(_num_bytes, runs))


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

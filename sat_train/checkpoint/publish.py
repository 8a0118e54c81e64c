"""Publishes a checkpoint so that it exists whole or not at all.

All ranks write into `.tmp-<step>-<id>/`, each file hashed and synced, and report what they wrote; rank 0
writes the manifest and renames the folder to `<step>/`. That rename is the commit. `latest` follows, for SAT
and for people. DeepSpeed by itself writes in place and updates `latest` before the other ranks are done, so a
kill leaves a torn checkpoint that it later loads.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sat_train.checkpoint.history import point_latest, set_aside
from sat_train.checkpoint.layout import (
    ABANDONED_SUFFIX,
    LATEST,
    MANIFEST,
    TEMPORARY_PREFIX,
    committed_steps,
    step_folder,
)
from sat_train.checkpoint.manifest import Manifest, read_manifest
from sat_train.distributed.collectives import gather_objects, on_rank_0
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.files import FileRecord, sync_folder, write_text
from sat_train.log import get_logger

log = get_logger(__name__)

# Room for everything else that is written meanwhile: logs, samples, other runs.
SPACE_MARGIN = 1.2


@dataclass(frozen=True)
class RankReport:
    """Report of one rank: the files it wrote into the temporary folder.

    Args:
        files: The files.
        failure: Reason why it could not write them all; empty on success.
    """

    files: list[FileRecord] = field(default_factory=list)
    failure: str = ""


def open_temporary(mesh: ProcessMesh, run_directory: Path, *, step: int, expected_bytes: int) -> Path:
    """Makes the temporary folder of one step, into which every rank writes its files.

    Args:
        run_directory: An existing folder, on a file system that all ranks see.
        step: The step.
        expected_bytes: Estimate of the total size, for the check of free space.

    Raises:
        CheckpointError: On all ranks alike: too little space, or the folder cannot be made. Earlier
            checkpoints are untouched.

    Ranks: all.
    """
    return on_rank_0(mesh, lambda: _open_temporary(run_directory, step, expected_bytes))


def commit(mesh: ProcessMesh, publish: Callable[[Sequence[RankReport]], Path], report: RankReport) -> Path:
    """Commits the temporary folder of one step, or removes it if any rank could not write.

    Args:
        publish: `publish_files`, for rank 0.
        report: Of this rank, whose files are complete.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: On all ranks alike: a failed write, or a folder that not all ranks see. Earlier
            checkpoints are untouched, and nothing of the failed save is left.

    Ranks: all.
    """
    reports = gather_objects(mesh, report)
    return on_rank_0(mesh, lambda: publish(reports))


def expected_size(run_directory: Path, first_guess: int) -> int:
    """Returns the size in bytes of the newest checkpoint in the folder, or `first_guess` if there is none."""
    try:
        for step in committed_steps(run_directory):
            return sum(record.size for record in read_manifest(step_folder(run_directory, step)).files)
    except CheckpointError as error:
        log.warning("%s", error)
    return first_guess


def _open_temporary(run_directory: Path, step: int, expected_bytes: int) -> Path:
    needed = int(expected_bytes * SPACE_MARGIN)
    free = shutil.disk_usage(run_directory).free
    if free < needed:
        raise CheckpointError(
            f"no room for the checkpoint of step {step} in {run_directory}: {_mib(free)} free",
            expected=f"{_mib(needed)}, which is {SPACE_MARGIN} times its size",
            remedy="free space, or keep fewer checkpoints (args.keep_last)",
        )
    temporary = run_directory / f"{TEMPORARY_PREFIX}{step}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    return temporary


def publish_files(
    temporary: Path,
    run_directory: Path,
    manifest: Manifest,
    check_held: Callable[[], None],
    reports: Sequence[RankReport],
) -> Path:
    """Does what `commit` does on rank 0.

    Args:
        temporary: From `open_temporary`.
        run_directory: As for `open_temporary`.
        manifest: Description of the checkpoint, without its files; its step names the folder. An existing
            folder of that name is set aside.
        check_held: Raises if the run directory belongs to another run by now; nothing is changed then.
        reports: Of all ranks.
    """
    check_held()
    try:
        _check_reports(temporary, manifest.step, reports)
        files = sorted((file for report in reports for file in report.files), key=lambda file: file.name)
        write_text(temporary / MANIFEST, replace(manifest, files=tuple(files)).to_json())
        target = _rename(temporary, run_directory, manifest.step)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _point_latest(run_directory, manifest.step)
    return target


def _check_reports(temporary: Path, step: int, reports: Sequence[RankReport]) -> None:
    failures = [f"rank {rank}: {report.failure}" for rank, report in enumerate(reports) if report.failure]
    if failures:
        raise CheckpointError(
            "\n  ".join([f"the checkpoint of step {step} could not be written:", *failures]),
            remedy="check that the disk has room and is writable; earlier checkpoints are intact",
        )
    for rank, report in enumerate(reports):
        for record in report.files:
            path = temporary / record.name
            if not path.is_file() or path.stat().st_size != record.size:
                raise CheckpointError(
                    f"rank 0 does not see {path}, which rank {rank} wrote",
                    expected="a run directory (args.save) on a file system that all machines share",
                )


def _rename(temporary: Path, run_directory: Path, step: int) -> Path:
    target = step_folder(run_directory, step)
    if os.path.lexists(target):
        aside = set_aside(target, ABANDONED_SUFFIX)
        log.warning("%s existed already and is set aside as %s", target, aside.name)
    os.rename(temporary, target)
    sync_folder(run_directory)
    return target


def _point_latest(run_directory: Path, step: int) -> None:
    try:
        point_latest(run_directory, step)
    except OSError as error:
        log.warning(
            "step %d is saved, but %s/%s could not be updated: %s", step, run_directory, LATEST, error
        )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"

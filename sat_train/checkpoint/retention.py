"""Deletes old checkpoints and what killed saves left behind."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from sat_train.checkpoint.history import read_best, read_latest
from sat_train.checkpoint.layout import TEMPORARY_PREFIX, committed_steps, step_folder
from sat_train.files import PART_SUFFIX, sync_folder
from sat_train.log import get_logger

log = get_logger(__name__)


def prune_checkpoints(
    run_directory: Path,
    *,
    keep_last: int,
    keep_every: int = 0,
    resumed_step: int | None = None,
    best_step: int | None = None,
) -> list[int]:
    """Deletes checkpoints that are too old. Call it after the new checkpoint is committed, never before.

    The steps that `latest` and `best` name are kept too; `latest` may be older if the disk was too full to
    update it.

    Args:
        run_directory: The run directory.
        keep_last: Number of the newest steps to keep; 0 keeps all.
        keep_every: Multiples of this are kept for good; 0 for none.
        resumed_step: The step that the run was resumed from, which is kept.
        best_step: The step with the lowest validation loss, which is kept; `best` may not have been written.

    Returns:
        The deleted steps.

    Ranks: one.
    """
    if keep_last <= 0:
        return []
    protected = {resumed_step, best_step, read_latest(run_directory), read_best(run_directory)}
    old = [step for step in committed_steps(run_directory)[keep_last:] if step not in protected]
    to_delete = [step for step in old if not (keep_every > 0 and step % keep_every == 0)]
    for step in to_delete:
        _delete(run_directory, step)
    return to_delete


def remove_leftovers(run_directory: Path) -> list[Path]:
    """Deletes the temporary folders and files of killed saves.

    Call it when this run owns the folder and is not saving.

    Ranks: one.
    """
    folders = sorted(path for path in run_directory.glob(TEMPORARY_PREFIX + "*") if path.is_dir())
    files = sorted(path for path in run_directory.glob("*" + PART_SUFFIX) if path.is_file())
    for path in folders + files:
        log.info("removing %s, left behind by an unfinished save", path)
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
    for path in files:
        path.unlink(missing_ok=True)
    return folders + files


def _delete(run_directory: Path, step: int) -> None:
    """Renames before deleting: a kill in between leaves a temporary folder, not half a checkpoint."""
    temporary = run_directory / f"{TEMPORARY_PREFIX}deleted-{step}-{uuid.uuid4().hex[:8]}"
    try:
        os.rename(step_folder(run_directory, step), temporary)
        sync_folder(run_directory)
    except OSError as error:
        log.warning(
            "the old checkpoint %s could not be deleted: %s", step_folder(run_directory, step), error.strerror
        )
        return
    shutil.rmtree(temporary, ignore_errors=True)

"""File and folder names inside a run directory; no other module spells them.

<run>/latest                     text: the newest committed step, for SAT and for people; not authoritative
<run>/best                       text: the saved step with the lowest validation loss
<run>/<step>/manifest.json       marks the step as committed
<run>/<step>/mp_rank_00_model_states.pt
                                 weights as SAT reads them: one file for each rank of the model axis
<run>/<step>/fragments_rank_00.pt
                                 what trains, one file a rank: fp32 masters, optimizer state, average
<run>/<step>/client_state.json   the position of the run, and its configuration
<run>/.tmp-<step>-<id>/          a save in progress, or one that was killed
<run>/.tmp-<step>-<id>/pieces_rank_01.pt
                                 ZeRO-3: weights of one rank, until the first has merged them into SAT's file
<run>/<step>.corrupt/            failed its verification; kept for inspection
<run>/<step>.abandoned/          came after the step that somebody went back to; kept
<run>/samples/                   validation videos, by step
<run>/PREEMPTED                  text: the step at which the run was stopped, for batch scripts
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sat_train.errors import CheckpointError

LATEST = "latest"
BEST = "best"
MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
CORRUPT_SUFFIX = ".corrupt"
ABANDONED_SUFFIX = ".abandoned"
PREEMPTED = "PREEMPTED"
SAMPLES = "samples"

_STEP_NAME = re.compile(r"0|[1-9][0-9]{0,17}")

# SAT's prefix of the transformer's keys in `mp_rank_XX_model_states.pt`.
SAT_PREFIX = "model.diffusion_model."
CLIENT_STATE = "client_state.json"


def step_folder(run_directory: Path, step: int) -> Path:
    """Returns the folder of one step."""
    return run_directory / str(step)


def model_file_name(model_rank: int) -> str:
    """Returns the file name of the weights of one rank of the model axis."""
    return f"mp_rank_{model_rank:02d}_model_states.pt"


def fragments_file_name(rank: int) -> str:
    """Returns the file name of the trained state that global rank `rank` owns."""
    return f"fragments_rank_{rank:02d}.pt"


def pieces_file_name(rank: int) -> str:
    """Returns the file name of the pieces of weights that global rank `rank` passes on to be merged."""
    return f"pieces_rank_{rank:02d}.pt"


def parse_step(name: str) -> int | None:
    """Returns the step that a folder name stands for, or None for other names."""
    return int(name) if _STEP_NAME.fullmatch(name) else None


def committed_steps(run_directory: Path) -> list[int]:
    """Returns the steps that have a manifest, newest first; their contents are not verified.

    One run directory holds one line of history (`history.rewind`), so the largest step is the last committed.

    Raises:
        CheckpointError: The folder cannot be read, so the newest step is unknown.
    """
    try:
        names = os.listdir(run_directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise cannot_read(run_directory, error) from error
    steps = [step for name in names if (step := parse_step(name)) is not None]
    return sorted((step for step in steps if is_committed(step_folder(run_directory, step))), reverse=True)


def is_committed(folder: Path) -> bool:
    """Returns whether a folder holds a manifest.

    Raises:
        CheckpointError: The folder cannot be read, so the answer is unknown.
    """
    try:
        os.stat(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise cannot_read(folder / MANIFEST, error) from error
    return True


def cannot_read(path: Path | str, error: OSError) -> CheckpointError:
    """Returns the error for a file that cannot be read now but may be whole."""
    return CheckpointError(
        f"{path} cannot be read: {error.strerror or error}",
        expected="a readable file; nothing was renamed, because it may be whole",
        remedy="check that the disk is mounted and healthy and that this user may read it, then start again; "
        "if the file is lost, move the step's folder away",
    )

"""Names inside a run directory. Nobody else spells them.

<run>/latest                     text: the newest committed step, for SAT and for people; never the truth
<run>/<step>/manifest.json       its presence means: committed
<run>/<step>/mp_rank_00_model_states.pt
                                 weights as SAT reads them: one file for each rank of the model axis
<run>/<step>/fragments_rank_00.pt
                                 what trains, one file a rank: fp32 masters, optimizer state, average
<run>/<step>/client_state.json   where the run stands, and its configuration
<run>/.tmp-<step>-<id>/          a save under way, or one that was killed
<run>/<step>.corrupt/            failed its verification; kept for a person to look at
<run>/<step>.abandoned/          lay after the step that a person went back to; kept for a person
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sat_train.errors import CheckpointError

LATEST = "latest"
MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
CORRUPT_SUFFIX = ".corrupt"
ABANDONED_SUFFIX = ".abandoned"

_STEP_NAME = re.compile(r"0|[1-9][0-9]{0,17}")

# What SAT puts before the transformer's keys in `mp_rank_XX_model_states.pt`.
SAT_PREFIX = "model.diffusion_model."
CLIENT_STATE = "client_state.json"


def step_folder(run_directory: Path, step: int) -> Path:
    """Returns the folder of one step."""
    return run_directory / str(step)


def model_file_name(model_rank: int) -> str:
    """Returns the name of the weights of one rank of the model axis."""
    return f"mp_rank_{model_rank:02d}_model_states.pt"


def fragments_file_name(rank: int) -> str:
    """Returns the name of the trained state that global rank `rank` owns."""
    return f"fragments_rank_{rank:02d}.pt"


def parse_step(name: str) -> int | None:
    """Returns the step that a folder's name means; None for other names."""
    return int(name) if _STEP_NAME.fullmatch(name) else None


def committed_steps(run_directory: Path) -> list[int]:
    """Returns the steps that have a manifest, newest first. Says nothing about their contents.

    One run directory holds one line of history (`history.rewind`), so the largest step is the last committed.

    Raises:
        CheckpointError: The folder cannot be looked into, so that nobody knows which is the newest.
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
    """Says whether a folder holds a manifest.

    Raises:
        CheckpointError: It cannot be looked into: that is not an answer.
    """
    try:
        os.stat(folder / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise cannot_read(folder / MANIFEST, error) from error
    return True


def cannot_read(path: Path | str, error: OSError) -> CheckpointError:
    """Returns the error for a file that may be whole, but cannot be read now."""
    return CheckpointError(
        f"{path} cannot be read: {error.strerror or error}",
        expected="a readable file; nothing was renamed, for it may be whole",
        remedy="see that the disk is mounted and healthy and that this user may read it, then start again; "
        "if it is lost, move the step's folder away",
    )

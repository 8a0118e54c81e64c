"""Names inside a run folder. Nobody else spells them.

<run>/latest                     text: the newest committed step, for SAT and for people; never the truth
<run>/<step>/manifest.json       its presence means: committed
<run>/<step>/mp_rank_00_model_states.pt
                                 weights as SAT writes them; zero_pp_rank_R_mp_rank_00_... under ZeRO-3
<run>/<step>/*zero_pp_rank_R_mp_rank_00_optim_states.pt
                                 DeepSpeed's optimizer shards
<run>/<step>/ema_rank_00.pt      average of the weights, when there is one
<run>/.tmp-<step>-<id>/          a save under way, or one that was killed
<run>/<step>.corrupt/            failed its verification; kept for a person to look at
"""

from __future__ import annotations

from pathlib import Path

LATEST = "latest"
MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-"
CORRUPT_SUFFIX = ".corrupt"

# What SAT puts before the transformer's keys in `mp_rank_XX_model_states.pt`.
SAT_PREFIX = "model.diffusion_model."
# The one key of DeepSpeed's client state that is ours.
CLIENT_STATE_KEY = "sat_train"


def step_folder(run_folder: Path, step: int) -> Path:
    """Returns the folder of one step."""
    return run_folder / str(step)


def ema_file_name(rank: int) -> str:
    """Returns the name of the weight average that global rank `rank` holds."""
    return f"ema_rank_{rank:02d}.pt"


def committed_steps(run_folder: Path) -> list[int]:
    """Returns the steps that have a manifest, newest first. Says nothing about their contents."""
    if not run_folder.is_dir():
        return []
    names = [
        path.name for path in run_folder.iterdir() if path.name.isdigit() and (path / MANIFEST).is_file()
    ]
    return sorted({int(name) for name in names if str(int(name)) == name}, reverse=True)

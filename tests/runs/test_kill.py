"""SIGKILL at any moment costs at most one save interval, or two while a save is written in the background.

The run continues as if nothing had happened. SAT_TRAIN_KILLS=20 kills it twenty times.
"""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

import pytest

from tests.forks import run, start
from tests.runs.launching import ROOT, SMALL, kill, metrics, run_directories, training_lines, wait_until

SAVE_INTERVAL = 4
KILLS = int(os.environ.get("SAT_TRAIN_KILLS", "4"))
STEPS = 30 * KILLS  # more than so many starts can do


def words(save: Path, steps: int, async_save: str = "off") -> list[str]:
    return [
        f"args.async_save={async_save}",
        *("--base", str(ROOT / "configs" / "sft.yaml"), "args.resume=auto", "args.log_interval=1"),
        *(f"args.save={save}", f"args.train_iters={steps}", f"args.save_interval={SAVE_INTERVAL}"),
        *("args.eval_interval=null", "args.valid_video_interval=null", "args.num_workers=0"),
        *("args.tensorboard=false", "args.lr_decay_style=constant", "args.warmup=0", *SMALL),
    ]


def logged_steps(save: Path) -> list[int]:
    """Returns the steps of all training lines, in the order they were written."""
    folders = run_directories(save)
    return [int(line["step"]) for line in metrics(folders[0]) if "grad_norm" in line] if folders else []


def is_saving(save: Path) -> bool:
    return any(any(folder.glob(".tmp-*")) for folder in run_directories(save))


def resumed_from(log: Path) -> int:
    """Returns the step that a run says it resumes from, 0 for one that starts afresh."""
    match = re.search(r"resuming from step (\d+)", log.read_text(encoding="utf-8"))
    return int(match.group(1)) if match else 0


def kill_at_some_moment(
    save: Path, *, inside_a_save: bool, async_save: str, rng: random.Random, log: Path
) -> int:
    """Starts the run, kills it once it has saved, and returns the step it went on from."""
    process = start("train_video.py", words(save, STEPS, async_save), log=log)

    def saw(text: str) -> bool:
        assert process.poll() is None, log.read_text()
        return text in log.read_text(encoding="utf-8")

    try:
        wait_until(lambda: saw(" saved "))
        if inside_a_save:
            wait_until(lambda: is_saving(save) or saw("complete"), poll_s=0.001)
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 0.5))
    finally:
        kill(process)
    return resumed_from(log)


@pytest.mark.slow
def test_kills_lose_at_most_one_save_interval_each_or_the_one_that_is_written(tmp_path: Path) -> None:
    rng = random.Random(7)
    save, reached = tmp_path / "killed", 0
    was_in_background = False
    for attempt in range(KILLS):
        in_background = attempt % 4 < 2
        step = kill_at_some_moment(
            save,
            inside_a_save=attempt % 2 == 1,
            async_save="on" if in_background else "off",
            rng=rng,
            log=tmp_path / f"{attempt}.txt",
        )
        most = (2 if was_in_background else 1) * SAVE_INTERVAL
        assert step >= reached - most, f"start {attempt} went on from {step} after {reached} steps"
        was_in_background = in_background
        reached = max(logged_steps(save))
    last = reached + 2 * SAVE_INTERVAL  # the rate is constant, so that a run's length changes no step
    finished = run("train_video.py", words(save, last))
    assert finished.returncode == 0, finished.output
    assert len(run_directories(save)) == 1, "auto resumes the one folder"

    straight = run("train_video.py", [*words(tmp_path / "straight", last), f"args.save_interval={last}"])
    assert straight.returncode == 0, straight.output
    killed_losses = {step: line["loss"] for step, line in training_lines(run_directories(save)[0]).items()}
    straight_folder = run_directories(tmp_path / "straight")[0]
    assert killed_losses == {step: line["loss"] for step, line in training_lines(straight_folder).items()}

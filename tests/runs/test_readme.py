"""The commands of the README, read from it, do what it says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests import forks
from tests.runs.launching import BIN, ROOT, metrics, run_directories, run_words, training_lines

README = (ROOT / "README.md").read_text(encoding="utf-8")
# What makes a command short: every run is cut to two steps, every sample to two denoising steps.
SHORT = {
    "train": "--train-iters 2 args.save_interval=1 args.eval_interval=2 args.eval_iters=1 "
    "args.valid_video_interval=2 args.sampling_steps=2 args.log_interval=1 args.save={folder}",
    "sample": "args.sampling_steps=2 args.output_dir={folder}",
    "check": "--no-paths",  # the released weights are not here
    "plan": "",
}
REAL = "sat-train train --base configs/sft.yaml"  # is started as a shell does; the others are forks
LOGGED = {"step", "loss", "lr", "grad_norm", "step_time_s", "data_wait_s", "samples_per_s", "peak_memory_gib"}


def commands() -> list[str]:
    """Returns the commands in the README's shell blocks, continued lines joined, comments cut off."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def runnable() -> list[str]:
    """Returns those that need neither a network, a GPU, released weights nor a folder of the reader's."""
    away = ("/weights/", "runs/")  # `test_newcomer.py` types these for real
    return [
        command
        for command in commands()
        if command.startswith(("torchrun", "sat-train")) and not any(part in command for part in away)
    ]


def test_the_readme_has_commands_to_run() -> None:
    assert len(runnable()) >= 6
    assert REAL in runnable()


@pytest.mark.parametrize("line", runnable())
def test_every_command_of_the_readme_runs(line: str, tmp_path: Path) -> None:
    words = _requoted(line)
    short = "" if "--help" in words else SHORT[words[1]].format(folder=tmp_path)
    words += shlex.split(short)
    if line == REAL or words[0] != "sat-train":
        done = run_words([str(BIN / words[0]), *words[1:]])
    else:
        done = forks.run_sat_train(words[1:])
    assert done.returncode == 0, done.output
    if words[1] == "train" and "--help" not in words:
        check_run(tmp_path)


def check_run(save: Path) -> None:
    """A run of two steps leaves everything that the documents promise: here of the presets as they stand."""
    (folder,) = run_directories(save)
    lines = training_lines(folder)
    assert sorted(lines) == [1, 2]
    assert set(lines[1]) >= LOGGED
    assert [record for record in metrics(folder) if "valid_loss" in record]
    assert (folder / "resolved.yaml").is_file()
    assert json.loads((folder / "model_config.json").read_text())["num_layers"] == 6
    assert (folder / "latest").read_text().strip() == "2"
    assert (folder / "2" / "manifest.json").is_file()
    assert (folder / "2" / "mp_rank_00_model_states.pt").is_file()
    assert list(folder.rglob("*.mp4"))
    assert list(folder.rglob("*.png"))


def _requoted(line: str) -> list[str]:
    """`commands` lost the quotes around a prompt; a prompt is everything after `--prompt`."""
    before, _, prompt = line.partition(" --prompt ")
    return [*before.split(), *(["--prompt", prompt] if prompt else [])]

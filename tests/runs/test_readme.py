"""The commands of the README, read from it, do what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.runs.launching import BIN, ROOT, run_words

README = (ROOT / "README.md").read_text(encoding="utf-8")
# What makes a command short: every run is cut to two steps, every sample to two denoising steps.
SHORT = {
    "train": "--train-iters 2 args.save_interval=2 args.eval_interval=2 args.sampling_steps=2 "
    "args.valid_video_interval=2 args.save={folder}",
    "sample": "args.sampling_steps=2 args.output_dir={folder}",
    "check": "--no-paths",  # the released weights are not here
}


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


@pytest.mark.parametrize("line", runnable())
def test_every_command_of_the_readme_runs(line: str, tmp_path: Path) -> None:
    words = _requoted(line)
    short = "" if "--help" in words else SHORT[words[1]].format(folder=tmp_path)
    done = run_words([str(BIN / words[0]), *words[1:], *shlex.split(short)])
    assert done.returncode == 0, done.output


def _requoted(line: str) -> list[str]:
    """`commands` lost the quotes around a prompt; a prompt is everything after `--prompt`."""
    before, _, prompt = line.partition(" --prompt ")
    return [*before.split(), *(["--prompt", prompt] if prompt else [])]

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
    "train_video.py": "--train-iters 2 args.save_interval=2 args.eval_interval=2 args.sampling_steps=2",
    "sample_video.py": "args.sampling_steps=2",
}


def commands() -> list[str]:
    """Returns the commands in the README's shell blocks, continued lines joined, comments cut off."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.strip()]


def runnable() -> list[str]:
    """Returns those that need neither a network, a GPU, released weights nor a folder of the reader's."""
    chosen = []
    for command in commands():
        is_ours = command.startswith(("torchrun", "sat-train"))
        if is_ours and "/weights/" not in command and "runs/" not in command:
            chosen.append(command)
    return chosen


def test_the_readme_has_commands_to_run() -> None:
    assert len(runnable()) >= 6


@pytest.mark.parametrize("line", runnable())
def test_command(line: str, tmp_path: Path) -> None:
    words = re.findall(r"launch/(\w+\.py)", line)
    short = shlex.split(SHORT[words[0]]) if words else []
    place = {"train_video.py": f"args.save={tmp_path}", "sample_video.py": f"args.output_dir={tmp_path}"}
    extra = [*short, place[words[0]]] if words else []
    if line.startswith("sat-train") and "cogvideox_5b" in line:
        extra = ["--no-paths"]  # the released weights are not here
    command = _requoted(line) + extra
    done = run_words([str(BIN / command[0]), *command[1:]])
    assert done.returncode == 0, done.output


def _requoted(line: str) -> list[str]:
    """`commands` lost the quotes around a prompt; a prompt is everything after `--prompt`."""
    before, _, prompt = line.partition(" --prompt ")
    return [*before.split(), *(["--prompt", prompt] if prompt else [])]

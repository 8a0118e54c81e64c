"""The six steps of docs/extend.md, with its files and commands, take a method from clips to its weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.forks import run_line
from tests.ranks.extensions import write_extensions
from tests.runs.launching import ROOT

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
LINES = 150  # of Python, that a method takes at most
# What makes the commands short: fewer clips and steps.
SHORTER = {
    "control": "control --sets moving --train 4 --valid 2",
    "args.train_iters=300": "args.train_iters=4",
    "args.eval_interval=50": "args.eval_interval=4 args.eval_iters=1",
    "args.save_interval=50": "args.save_interval=2",
    "args.valid_video_interval=100": "args.valid_video_interval=4 args.sampling_steps=2",
}


def commands() -> list[str]:
    begin, end = PAGE.index("## From a paper to samples"), PAGE.index("## The step in one picture")
    blocks = re.findall(r"```sh\n(.*?)```", PAGE[begin:end], re.DOTALL)
    return [line for block in blocks for line in block.strip().splitlines()]


def run(line: str, folder: Path) -> str:
    """Runs a command of the page in a folder and returns its output."""
    done = run_line(" ".join(SHORTER.get(word, word) for word in line.split()), cwd=folder)
    assert done.returncode == 0, f"{line}: {done.output}"
    return done.output


@pytest.mark.slow
def test_the_six_steps_lead_to_weights_of_their_own(tmp_path: Path) -> None:
    write_extensions(tmp_path)
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    outputs = {line: run(line, tmp_path) for line in commands() if not line.startswith("head ")}
    trained = next(output for line, output in outputs.items() if " train " in line)
    assert re.search(r"mixins\.fuser +0 +[\d,]+ +[\d,]+\n", trained), "nothing of it is copied from the base"
    assert re.search(r"tracks: true minus another clip's [+-]0\.\d+", trained)
    assert list(tmp_path.glob("runs/tracks-*/samples/**/*"))
    weights = load_file(tmp_path / "tracks_weights" / "modules.safetensors")
    assert len(weights) == 2 * 6
    assert all(tensor.any() for tensor in weights.values())


def test_the_method_is_short_and_its_files_are_all_shown() -> None:
    begin, end = PAGE.index("## From a paper to samples"), PAGE.index("## The step in one picture")
    code = re.findall(r"```python\n(.*?)```", PAGE[begin:end], re.DOTALL)
    assert sum(len(block.splitlines()) for block in code) <= LINES

"""The six steps of docs/extend.md, with its files and commands, take a method from clips to its weights."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.forks import start_python
from tests.ranks.extensions import write_extensions
from tests.runs.launching import ROOT

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
LINES = 150  # of Python, that a method takes at most
IN_FOLDER = "import os, sys; os.chdir(sys.argv.pop(1))\n"
COMMAND = f"{IN_FOLDER}from sat_train.cli.main import main; sys.exit(main(sys.argv[1:]))"
SCRIPT = f"{IN_FOLDER}import runpy; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
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
    words = [word for each in shlex.split(line) for word in SHORTER.get(each, each).split()]
    files = [[str(path.relative_to(folder)) for path in folder.glob(word)] or [word] for word in words[1:]]
    program, arguments = words[0], [word for found in files for word in found]
    if program == "python":
        words = ["-c", SCRIPT, str(folder), str(ROOT / arguments[0]), *arguments[1:]]
    else:
        assert program == "sat-train"
        words = ["-c", COMMAND, str(folder), *arguments]
    log = folder / "log.txt"
    code = start_python(words, log=log).wait(timeout=240)
    output = log.read_text(encoding="utf-8")
    assert code == 0, f"{line}: {output}"
    return output


@pytest.mark.slow
def test_the_six_steps_lead_to_weights_of_their_own(tmp_path: Path) -> None:
    write_extensions(tmp_path)
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

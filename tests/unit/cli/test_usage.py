"""`--help` of the commands that run on several ranks: the first thing that anybody types."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from sat_train.cli.main import main
from sat_train.config.catalog import all_keys

COMMANDS = {"train": "train_video.py", "sample": "sample_video.py", "precompute": "precompute.py"}
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["sat"] = sys.modules["deepspeed"] = None  # importing them fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_usage_examples_main_settings_and_where_to_read_on(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, flag]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert f"usage: sat-train {command} --base FILE" in output.out
    assert output.out.count("  # ") == 5
    assert "--explain args.lr" in output.out
    settings = re.findall(r"^  (\w+) {2,}(.+)$", output.out, flags=re.MULTILINE)
    assert len(settings) == 10
    assert all(all_keys()[f"args.{name}"].description == what for name, what in settings)
    assert all(len(line) <= 120 for line in output.out.splitlines())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_launchers_help_needs_no_torch_and_comes_from_rank_0(rank: str) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "launch/train_video.py", "--help"]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"RANK": rank, "WORLD_SIZE": "2", "PATH": "/usr/bin"},
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ("usage: " in ended.stdout) == (rank == "0")

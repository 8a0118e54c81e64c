"""The skeletons of `sat-train new-extension` work as they are written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sat_train.cli.main import main
from sat_train.cli.new_extension import KINDS, write_skeleton
from sat_train.distributed.processes import stop_processes
from sat_train.testing import LAWS, check_extension

# `SAT_TRAIN_ALL_LAWS=1` tries every law on every skeleton, as their own tests do; a minute each.
SOME = LAWS if "SAT_TRAIN_ALL_LAWS" in os.environ else ("typos", "base", "gradients")


@pytest.mark.parametrize("kind", KINDS)
def test_a_skeleton_passes_its_laws_as_it_is(tmp_path: Path, kind: str) -> None:
    stop_processes()
    folder = write_skeleton(tmp_path, "my_camera", kind)
    words = [folder / "my_camera.yaml", "model.network_config.params.num_layers=2"]
    report = check_extension(folder, *words, laws=SOME)
    assert not report.broken
    assert next(each for each in report.results if each.law == "typos").outcome == "holds"


def test_a_skeleton_is_a_folder_with_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-extension", "camera", "--folder", str(tmp_path)]) == 0
    folder = tmp_path / "camera"
    names = {path.name for path in folder.iterdir()}
    assert names == {"__init__.py", "parts.py", "camera.yaml", "README.md", "test_camera.py"}
    assert f"pytest -s {folder}" in capsys.readouterr().out
    assert main(["new-extension", "camera", "--folder", str(tmp_path)]) == 2
    assert f"{folder} exists already" in capsys.readouterr().err
    for name in ("Camera", "my-camera", "json", "class", "../x"):
        assert main(["new-extension", name, "--folder", str(tmp_path)]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"camera"}


def test_skeletons_are_written_as_the_package_is(tmp_path: Path) -> None:
    for kind in KINDS:
        write_skeleton(tmp_path, f"my_{kind}", kind)
    settings = Path(__file__).resolve().parents[3] / "pyproject.toml"
    for words in (["format", "--check"], ["check", "--ignore", "I"]):
        command = [sys.executable, "-m", "ruff", *words, "--config", str(settings), str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout

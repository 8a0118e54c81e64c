"""`sat-train check` as a process: exit code, no traceback, no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from sat_train.cli.main import COMMANDS, main, run_cli
from sat_train.errors import LaunchError, TrainingError

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it fails
sys.modules["sat"] = None
from sat_train.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def check(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, "check", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_good_configuration() -> None:
    done = check("--base", "configs/sft.yaml", "--no-paths")
    assert (done.returncode, done.stderr) == (0, "")
    assert "configs/model/cogvideox_tiny.yaml" in done.stdout
    assert "args.train_iters" in done.stdout


def test_a_bad_configuration(tmp_path: object) -> None:
    broken = f"{tmp_path}/broken.yaml"
    with open(broken, "w", encoding="utf-8") as file:
        file.write("args: {train_iterz: 5}\ndata: {params: {max_num_frames: 50}}\n")
    done = check("--base", "configs/sft.yaml", broken, "--no-paths", "--lr", "fast")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    for says in ("args.train_iterz", "50 is not 4k+1", "args.lr = fast", "3 faults"):
        assert says in done.stderr


def test_training_names_the_same_faults() -> None:
    words = ["--base", "configs/sft.yaml", "--seed", "abc", "data.params.max_num_frames=50", "args.lod=x"]
    words += ["args.load=/nowhere/weights.pt"]
    command = [sys.executable, "launch/train_video.py", *words]
    trained = subprocess.run(command, capture_output=True, text=True, check=False)
    checked = check(*words)
    assert trained.returncode == checked.returncode == 2
    for says in ("args.seed = abc", "50 is not 4k+1", "args.lod", "args.load = /nowhere/weights.pt"):
        assert says in checked.stderr
    assert checked.stderr in trained.stderr
    assert "Traceback" not in trained.stderr


def test_one_key() -> None:
    done = check("--explain", "args.resume")
    assert done.returncode == 0
    assert "args.resume" in done.stdout


@pytest.mark.parametrize(
    ("raised", "code"),
    [(LaunchError("a"), 2), (TrainingError("b"), 1), (KeyboardInterrupt(), 130)],
)
def test_exceptions_become_exit_codes(
    raised: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> int:
        raise raised

    assert run_cli(command) == code
    assert "Traceback" not in capsys.readouterr().err


def test_success_keeps_its_code() -> None:
    assert run_cli(lambda: 0) == 0


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["chekc"], 2)])
def test_no_command_help_and_a_typo_list_all_commands(
    words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    said = capsys.readouterr()
    assert all(name in said.out + said.err for name in COMMANDS)


def test_build_counts_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--base", "configs/lora.yaml", "--no-paths", "--build"]) == 0
    out = capsys.readouterr().out
    assert "transformer.layers" in out
    assert "layer_forward" in out


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Callable[[], None]:
    from sat_train.distributed.processes import stop_processes

    yield
    stop_processes()

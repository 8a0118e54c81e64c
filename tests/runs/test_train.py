"""Training commands that a signal or a loss stops: what they save, say and return."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.forks import run, start
from tests.runs import launching
from tests.runs.launching import ROOT, SMALL, run_directories, training_lines, wait_until

FAST = [
    *("args.log_interval=1", "args.eval_interval=null", "args.valid_video_interval=null"),
    *("args.num_workers=0", "args.tensorboard=false", "args.checkpoint_activations=auto", *SMALL),
]


def base(*names: str) -> list[str]:
    return ["--base", *(str(ROOT / "configs" / name) for name in names)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_in_order(number: signal.Signals, code: int, tmp_path: Path) -> None:
    words = [
        *base("sft.yaml"),
        *FAST,
        f"args.save={tmp_path}",
        "args.train_iters=5000",
        "args.save_interval=5000",
    ]
    log = tmp_path / "log.txt"
    process = start("train_video.py", words, log=log)
    wait_until(
        lambda: (
            (run_directories(tmp_path) and training_lines(run_directories(tmp_path)[0]))
            or process.poll() is not None
        )
    )
    assert process.poll() is None, log.read_text()
    process.send_signal(number)
    assert process.wait(timeout=240) == code, log.read_text()
    (folder,) = run_directories(tmp_path)
    saved = int((folder / "latest").read_text())
    assert saved == max(training_lines(folder))
    assert "Traceback" not in log.read_text()
    assert log.read_text().splitlines()[-1].endswith(f"saved step {saved}; resume with args.resume=auto")
    assert (folder / str(saved) / "manifest.json").is_file()
    assert list(folder.glob("PREEMPTED*"))


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    """A learning rate that no model survives: the first update ruins the weights, the next loss shows it."""
    words = [*base("sft.yaml"), *FAST, f"args.save={tmp_path}", "args.train_iters=50", "args.save_interval=1"]
    huge = ["deepspeed.optimizer.params.lr=1e15", "args.warmup=0", "deepspeed.gradient_clipping=0.0"]
    done = run("train_video.py", [*words, *huge])
    assert done.returncode == 1, done.output
    assert "Traceback" not in done.output
    assert "not finite" in done.output
    assert "rank 0" in done.output
    (folder,) = run_directories(tmp_path)
    last = int((folder / "latest").read_text())
    assert (folder / str(last) / "manifest.json").is_file()


def test_ctrl_c_on_two_ranks_saves_and_no_rank_shows_a_traceback(tmp_path: Path) -> None:
    """As in a terminal: SIGINT goes to torchrun and all ranks, and torchrun sends it on once more."""
    words = [*base("sft.yaml"), *FAST, f"args.save={tmp_path}", "args.train_iters=5000"]
    log = tmp_path / "log.txt"
    process = launching.start("train_video.py", [*words, "args.save_interval=5000"], processes=2, log=log)
    wait_until(lambda: process.poll() is not None or " step 2/" in log.read_text())
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=240) != 0
    (folder,) = run_directories(tmp_path)
    saved = int((folder / "latest").read_text())
    assert (folder / str(saved) / "manifest.json").is_file()
    output = log.read_text()
    assert f"saved step {saved}; resume with args.resume=auto" in output
    assert "KeyboardInterrupt" not in output
    assert "again" not in output, "one press of a key is one request"


def test_ctrl_c_before_the_first_step_ends_clearly(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    process = start("train_video.py", [*base("sft.yaml"), *FAST, f"args.save={tmp_path}"], log=log)
    wait_until(lambda: process.poll() is not None or "run directory" in log.read_text())
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=240) == 130
    assert "Traceback" not in log.read_text()
    assert log.read_text().splitlines()[-1] == "SIGINT: stopped before the first step; nothing was trained"

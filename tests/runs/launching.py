"""Starts whole commands as a person would, and reads what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Samples whose encoding takes no time beside everything else that a run does.
SMALL = ("data.params.max_num_frames=5", "data.params.video_size=[32,48]")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    returncode: int
    output: str


class Started(Protocol):
    """A command that runs: a `Popen`, or a fork of `tests/forks.py`."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


def environment() -> dict[str, str]:
    """Returns this environment without anything a launcher or an outer test run set.

    `tests/conftest.py` has hidden CUDA in it, unless the GPU tests run.
    """
    launcher = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "GROUP_RANK",
    )
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in launcher and "TORCHELASTIC" not in name
    }
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "200",
    }


def command(script: str, words: Sequence[str], *, processes: int) -> list[str]:
    """Returns `torchrun ...` for several processes, plain python for one: both are ways people start it."""
    launch = str(ROOT / "launch" / script)
    if processes == 1:
        return [sys.executable, launch, *words]
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    return [*torchrun, launch, *words]


def start(script: str, words: Sequence[str], *, processes: int = 1, log: Path) -> subprocess.Popen[bytes]:
    """Starts a launch script in a process group of its own; its output goes to `log`."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            command(script, words, processes=processes),
            cwd=ROOT,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(script: str, words: Sequence[str], *, processes: int = 1, timeout_s: float = 300) -> Finished:
    """Runs a launch script to its end."""
    return run_words(command(script, words, processes=processes), timeout_s=timeout_s)


def run_words(words: Sequence[str], *, cwd: Path = ROOT, timeout_s: float = 300) -> Finished:
    """Runs any command to its end."""
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Finished(done.returncode, done.stdout)


def kill(process: Started) -> None:
    """SIGKILL to the command and everything it started."""
    with suppress(ProcessLookupError):  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until(condition, *, timeout_s: float = 240, poll_s: float = 0.02) -> None:
    """Waits for `condition()`; fails the test when it never comes true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the awaited condition never came true"
        time.sleep(poll_s)


def run_directories(save: Path) -> list[Path]:
    return sorted(path for path in save.glob("*") if path.is_dir()) if save.exists() else []


def metrics(run_directory: Path) -> list[dict[str, object]]:
    """Returns the lines of `metrics.jsonl`; a line that a kill cut short is left out."""
    path = run_directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def training_lines(run_directory: Path) -> dict[int, dict[str, object]]:
    """Returns the logged training steps; where a step was done twice, the later line."""
    return {int(line["step"]): line for line in metrics(run_directory) if "grad_norm" in line}  # type: ignore[call-overload]

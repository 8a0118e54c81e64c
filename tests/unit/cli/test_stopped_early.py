"""A signal before there is a run to save ends the command with a line that names it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

PROGRAM = """
import os, signal, sys
from sat_train.cli import ranks

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

def read_nothing(*words, **options):
    os.kill(os.getpid(), signal.{name})

ranks.{where} = read_nothing
sys.exit(ranks.run_on_ranks("train", ("nowhere", "nothing"), []))
"""


@pytest.mark.parametrize("where", ["configure_logging", "load_run_config"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_before_the_start_is_named_without_a_traceback(where: str, name: str, code: int) -> None:
    program = PROGRAM.format(name=name, where=where)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(f"{name}: stopped before the start")
    assert len(done.stderr.splitlines()) == 1


def test_a_rank_that_waits_for_one_that_is_gone_ends_when_it_is_told_to() -> None:
    with socket.create_server(("127.0.0.1", 0)) as rank_0:  # takes the call and never answers
        layout = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(rank_0.getsockname()[1])}
        waiting = subprocess.Popen(
            [sys.executable, str(ROOT / "launch/train_video.py"), "--base", str(ROOT / "configs/sft.yaml")],
            env={**os.environ, **layout, **place},
            stderr=subprocess.PIPE,
            text=True,
        )
        rank_0.settimeout(240)
        call, _ = rank_0.accept()
        with call:
            waiting.send_signal(signal.SIGTERM)
            _, errors = waiting.communicate(timeout=240)
    assert waiting.returncode == 143, errors
    assert "SIGTERM while waiting, perhaps for another rank: stopped before the start" in errors
    assert "rank 1" in errors
    assert "Traceback" not in errors

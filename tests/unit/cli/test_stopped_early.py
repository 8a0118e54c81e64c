"""A signal before there is a run to save ends the command with a line that names it."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
@pytest.mark.parametrize(
    ("name", "line", "code"), [("SIGTERM", "SIGTERM before the start", 143), ("SIGINT", "interrupted", 130)]
)
def test_a_signal_before_the_start_is_named_without_a_traceback(
    where: str, name: str, line: str, code: int
) -> None:
    program = PROGRAM.format(name=name, where=where)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1

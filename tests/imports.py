"""Imports what ranks and commands need; `tests/forks.py` forks the process that has done so."""

import os
from importlib import import_module
from pathlib import Path

MODULES = (
    "sat_train.testing.imports",
    "sat_train.cli.ranks",
    "sat_train.cli.sample_videos",
    "sat_train.cli.main",
    "sat_train.cli.convert",
    "sat_train.cli.data",
)

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the commands set it before they import torch
try:
    for module in MODULES:
        import_module(module)
except ImportError as error:  # multiprocessing would leave out what cannot be imported, and say nothing
    raise RuntimeError(f"tests/imports.py: {error}") from error
(THREADS,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "Threads:" in line)
assert THREADS.split()[1] == "1", f"{THREADS}: a fork has none of them, and may wait for them forever"

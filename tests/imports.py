"""Imports what ranks and commands need and reads what they do; `tests/forks.py` forks the process."""

import gc
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
    "pytest",
)

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as the commands set it before they import torch
try:
    for module in MODULES:
        import_module(module)
    from sat_train.config import load_run_config

    for name in ("sft", "lora"):
        load_run_config([f"configs/{name}.yaml"], check_paths=False)
except ImportError as error:  # multiprocessing would leave out what cannot be imported, and say nothing
    raise RuntimeError(f"tests/imports.py: {error}") from error
gc.freeze()  # as in sat_train.testing.imports
(THREADS,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "Threads:" in line)
assert THREADS.split()[1] == "1", f"{THREADS}: a fork has none of them, and may wait for them forever"

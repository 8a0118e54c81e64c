"""Processors of this machine, which its ranks share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sat_train.distributed.environment import RankEnv


def available_processors() -> int:
    """Returns the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processors_of_a_rank() -> int:
    """Returns this rank's share of the processors, at least 1.

    Ranks of a machine share what each of them may use, except where SLURM has bound each to its own part.
    """
    env, available = RankEnv.read(), available_processors()
    if env.launcher == "slurm" and available < int(os.environ.get("SLURM_CPUS_ON_NODE", "0")):
        return available
    return max(1, available // env.local_world_size)


@contextmanager
def threads_of_a_rank() -> Iterator[None]:
    """Computes on the CPU with this rank's share of the processors, where it has fewer threads.

    torchrun gives each of several ranks one thread.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, processors_of_a_rank()))
    try:
        yield
    finally:
        torch.set_num_threads(before)

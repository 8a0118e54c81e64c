"""The ranks of a machine divide its processors, each processor to one of them."""

import os

import pytest

from sat_train.distributed.processors import processors_of_a_rank

TORCHRUN = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "4",
    "SLURM_STEP_NODELIST": "gpu1",
    "SLURM_CPUS_ON_NODE": "32",
}


@pytest.mark.parametrize(
    ("variables", "available", "share"),
    [
        ({}, 32, 32),
        (TORCHRUN, 32, 8),
        (TORCHRUN, 3, 1),
        (SLURM, 32, 8),  # tasks that are not bound share the machine
        (SLURM, 8, 8),  # a task that is bound has its own
        # one torchrun in a task, which its ranks share
        ({**SLURM, **TORCHRUN, "TORCHELASTIC_RUN_ID": "1"}, 16, 4),
    ],
)
def test_a_rank_has_its_share(monkeypatch, variables, available, share):
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr("sat_train.distributed.processors.available_processors", lambda: available)
    assert processors_of_a_rank() == share

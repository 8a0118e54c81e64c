"""Starting alone, stopping, and refusing layouts that cannot be."""

import os

import pytest
import torch
import torch.distributed as dist

from sat_train.distributed.collectives import broadcast_object, gather_objects, max_flags
from sat_train.distributed.environment import RankEnv
from sat_train.distributed.processes import start_processes, start_single_process, stop_processes
from sat_train.errors import LaunchError


@pytest.fixture(autouse=True)
def _stopped():
    stop_processes()
    yield
    stop_processes()


def test_a_single_process_needs_no_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    grid = start_single_process()
    assert (grid.rank, grid.world_size, grid.data_size, grid.model_size) == (0, 1, 1, 1)
    assert grid.device == torch.device("cpu")
    assert start_single_process() is grid
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_processes_can_be_started_again():
    start_single_process()
    stop_processes()
    assert not dist.is_initialized()
    assert start_single_process().world_size == 1


def test_at_world_size_1_no_collective_touches_the_group(monkeypatch):
    grid = start_single_process()
    for name in ("all_reduce", "broadcast_object_list", "all_gather_object"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("a collective was called"))
    flags = torch.tensor([1.0])
    assert broadcast_object(grid, "a") == "a"
    assert gather_objects(grid, 3) == [3]
    assert max_flags(grid, flags) is flags


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_parallel_size": 2}, "args.model_parallel_size = 2 with 1 processes"),
        ({"backend": "nccl"}, "args.distributed_backend = nccl on cpu"),
    ],
)
def test_impossible_layouts_are_refused(options, message):
    with pytest.raises(LaunchError, match=message):
        start_processes(RankEnv.single(), device="cpu", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(LaunchError, match=r"args\.device = cuda"):
        start_processes(RankEnv.single(), device="cuda")


def test_ranks_that_do_not_meet_are_reported():
    env = RankEnv(1, 1, 2, 2, "127.0.0.1", 1, "torchrun")
    with pytest.raises(LaunchError, match=r"rank 1 of 2 did not reach tcp://127\.0\.0\.1:1"):
        start_processes(env, device="cpu", timeout_minutes=0.02)

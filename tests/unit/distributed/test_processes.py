"""Starting alone, stopping, and refusing layouts that cannot be."""

import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from sat_train.distributed import processes
from sat_train.distributed.collectives import broadcast_object, gather_objects, max_flags
from sat_train.distributed.environment import RankEnv
from sat_train.distributed.meeting import announce, call_the_roll
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
    mesh = start_single_process()
    assert (mesh.rank, mesh.world_size, mesh.data_size, mesh.model_size) == (0, 1, 1, 1)
    assert mesh.device == torch.device("cpu")
    assert start_single_process() is mesh
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_processes_can_be_started_again():
    start_single_process()
    stop_processes()
    assert not dist.is_initialized()
    assert start_single_process().world_size == 1


def test_at_world_size_1_no_collective_touches_the_group(monkeypatch):
    mesh = start_single_process()
    for name in ("all_reduce", "broadcast_object_list", "all_gather_object"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("a collective was called"))
    flags = torch.tensor([1.0])
    assert broadcast_object(mesh, "a") == "a"
    assert gather_objects(mesh, 3) == [3]
    assert max_flags(mesh, flags) is flags


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


def _sees_gpus(monkeypatch, uuids: list[str], visible: str = "") -> None:
    """Lets torch report GPUs, as CUDA would; nothing is computed on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[device.index])
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    ("gpus", "local_rank", "index"), [(8, 0, 0), (8, 7, 7), (1, 0, 0), (1, 1, 0), (1, 7, 0), (2, 1, 1)]
)
def test_each_process_takes_its_gpu_or_the_only_one_that_it_sees(monkeypatch, gpus, local_rank, index):
    _sees_gpus(monkeypatch, [f"uuid{number}" for number in range(gpus)])
    monkeypatch.setenv("LOCAL_RANK", "")
    env = RankEnv(local_rank, local_rank, 8, 8, "gpu03", 29500, "slurm")
    device = processes._choose_device("auto", env)
    assert device == torch.device("cuda", index)
    processes._prepare_deepspeed(env, device)
    assert os.environ["LOCAL_RANK"] == str(index), "DeepSpeed takes its device from there"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    _sees_gpus(monkeypatch, ["a", "b"])
    with pytest.raises(LaunchError, match="process 2 of this machine has no GPU of its own"):
        processes._choose_device("auto", RankEnv(2, 2, 4, 4, "gpu03", 29500, "torchrun"))


@pytest.mark.parametrize(
    ("uuids", "visible", "is_shared"),
    [
        (["GPU-1", "GPU-2"], ["0", "0"], False),  # each task sees its own as the first
        (["GPU-1", "GPU-1"], ["0", "0"], True),  # two processes that really share one
        (["GPU-1", "GPU-1"], ["MIG-1", "MIG-2"], False),  # slices of one
        (["GPU-1", "GPU-1"], ["MIG-1", "MIG-1"], True),
        (["GPU-1", "GPU-1"], ["", ""], True),
    ],
)
def test_two_processes_on_one_gpu_are_distinguished_from_two_that_see_one_each(
    monkeypatch, uuids, visible, is_shared
):
    store = dist.HashStore()
    envs = [RankEnv(rank, rank, 2, 2, "gpu03", 29500, "torchrun") for rank in (0, 1)]
    for env, uuid, names in zip(envs, uuids, visible, strict=True):
        _sees_gpus(monkeypatch, [uuid], names)
        announce(store, env, processes._identify_gpu(processes._choose_device("auto", env)))
    if is_shared:
        with pytest.raises(LaunchError, match="ranks 0 and 1 have the same GPU"):
            call_the_roll(store, envs[0], timedelta(seconds=5))
    else:
        assert len(call_the_roll(store, envs[1], timedelta(seconds=5))) == 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ],
)
def test_the_allocator_may_grow_its_segments_unless_the_environment_says_how_it_works(
    monkeypatch, given, expected
):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # restored at the end, whatever the code sets
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    _sees_gpus(monkeypatch, ["uuid0"])
    processes._choose_device("auto", RankEnv.single())
    assert {name: os.environ[name] for name in names if name in os.environ} == expected

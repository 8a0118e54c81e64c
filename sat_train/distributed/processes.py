"""Starts and stops the process group, and lays the processes out as a mesh of data and model axes."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d

import sat_train.distributed.sat_packages  # noqa: F401
from sat_train.distributed.environment import RankEnv
from sat_train.distributed.meeting import announce, call_the_roll, meet
from sat_train.errors import LaunchError

_BACKENDS = {"cuda": ("nccl", "gloo"), "cpu": ("gloo",)}


@dataclass(frozen=True)
class ProcessMesh:
    """The processes as a mesh: `rank = data_rank * model_size + model_rank`.

    Args:
        rank: Global rank.
        local_rank: Rank on this machine.
        world_size: Processes in all: `data_size * model_size`.
        data_rank: Position on the data axis, which selects the samples of this process.
        data_size: Processes on the data axis.
        data_group: Processes with the same slice of the model and other samples.
        model_rank: Position on the model axis, which selects this process's slice of the weights.
        model_size: Processes on the model axis.
        model_group: Processes with the same samples and other slices of the model.
        device: Device on which this process computes.
        backend: `nccl` or `gloo`.
        store: Key-value store that all processes share.
    """

    rank: int
    local_rank: int
    world_size: int
    data_rank: int
    data_size: int
    data_group: dist.ProcessGroup
    model_rank: int
    model_size: int
    model_group: dist.ProcessGroup
    device: torch.device
    backend: str
    store: Store


_mesh: ProcessMesh | None = None
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is its older name


def start_processes(
    env: RankEnv,
    *,
    device: str = "auto",
    backend: str = "auto",
    model_parallel_size: int = 1,
    timeout_minutes: float = 30,
    store: Store | None = None,
) -> ProcessMesh:
    """Joins this process to the others and creates the groups, including those of `sat.mpu`.

    A single process gets an in-memory store: no network, no port.

    Args:
        env: Rank of this process.
        device: `auto`, `cuda` or `cpu`; `auto` is CUDA if there is a device.
        backend: `auto`, `nccl` or `gloo`; `auto` is NCCL on CUDA and gloo on the CPU.
        model_parallel_size: Processes that share one copy of the model; must divide the world size.
        timeout_minutes: Longest wait for a rank, at the start and in each collective.
        store: Store in which the ranks have met already.

    Raises:
        LaunchError: The layout, device or backend is impossible, or other processes were not reached.

    Ranks: all.
    """
    assert _mesh is None, "the processes have been started already"
    where = _choose_device(device, env)
    chosen_backend = _choose_backend(backend, where)
    if env.world_size % model_parallel_size:
        raise LaunchError(
            f"args.model_parallel_size = {model_parallel_size} with {env.world_size} processes",
            expected="a divisor of the number of processes",
        )
    _prepare_deepspeed(env, where)
    timeout = timedelta(minutes=timeout_minutes)
    store = meet(env, timeout) if store is None else store
    announce(store, env, _identify_gpu(where))
    call_the_roll(store, env, timeout)
    _set_default_timeout(timeout)
    dist.init_process_group(
        chosen_backend, store=store, rank=env.rank, world_size=env.world_size, timeout=timeout
    )
    return _lay_out(env, where, chosen_backend, store, model_parallel_size)


def start_single_process(device: str = "cpu") -> ProcessMesh:
    """Returns a mesh of this process alone, without environment or network; an existing mesh is reused.

    For meta builds, tools and unit tests: SAT's layers ask `sat.mpu` for their sizes when they are built.
    """
    if _mesh is not None:
        assert _mesh.world_size == 1, "this process is one of several"
        return _mesh
    return start_processes(RankEnv.single(), device=device)


def start_planned_rank(model_parallel_size: int) -> ProcessMesh:
    """Returns the mesh of the first of the ranks that share a model, without the others.

    For counting on the meta device: sums over ranks return at once, and leave tensors as they are.
    """
    if model_parallel_size == 1:
        return start_single_process()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    stop_processes()
    device, size = torch.device("cpu"), model_parallel_size
    env = RankEnv(0, 0, size, size, "", 0, "single")
    _prepare_deepspeed(env, device)
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=size)
    return _lay_out(env, device, "fake", store, size)


def stop_processes() -> None:
    """Leaves the process group, if there is one, without waiting for the other ranks."""
    global _mesh
    if _mesh is None:
        return
    from sat import mpu

    mpu.destroy_model_parallel()
    dist.destroy_process_group()
    _forget_groups_in_deepspeed()
    _mesh = None


def _forget_groups_in_deepspeed() -> None:
    """Clears DeepSpeed's module variables, which would bring the old groups into the next start."""
    comm: Any = sys.modules.get("deepspeed.comm.comm")
    groups: Any = sys.modules.get("deepspeed.utils.groups")
    if comm is not None and groups is not None:
        comm.cdb = groups.mpu = groups.mesh_device = None
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def _choose_device(device: str, env: RankEnv) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError("args.device = cuda", expected="a CUDA device", remedy="use args.device=cpu")
    _let_segments_grow()
    count = torch.cuda.device_count()
    # a process that sees one GPU got it from the launcher; the roll call checks that no other has the same
    index = 0 if count == 1 else env.local_rank
    if index >= count:
        raise LaunchError(
            f"process {env.local_rank} of this machine has no GPU of its own",
            expected=f"at most {count} processes on this machine",
            remedy="lower --nproc_per_node, or check CUDA_VISIBLE_DEVICES",
        )
    where = torch.device("cuda", index)
    torch.cuda.set_device(where)
    return where


def _let_segments_grow() -> None:
    """Lets PyTorch's allocator map memory as it is needed, unless the environment says how it works.

    Segments of fixed sizes left 12 GB of 63 unused in a step of 2B on an H100, and cost no time.
    """
    if not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def _identify_gpu(device: torch.device) -> str:
    """Returns the same text for all processes that would share a GPU, or a slice of one."""
    if device.type == "cpu":
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    name = visible[device.index].strip() if device.index < len(visible) else ""
    return name if name.startswith("MIG-") else str(torch.cuda.get_device_properties(device).uuid)


def _choose_backend(backend: str, device: torch.device) -> str:
    allowed = _BACKENDS[device.type]
    if backend == "auto":
        return allowed[0]
    if backend not in allowed:
        raise LaunchError(
            f"args.distributed_backend = {backend} on {device.type}", expected=" or ".join(("auto", *allowed))
        )
    return backend


def _prepare_deepspeed(env: RankEnv, device: torch.device) -> None:
    """Sets the variables that DeepSpeed reads when it is imported and initialised, for any launcher."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = str(env.local_rank if device.type == "cpu" else device.index)


def _set_default_timeout(timeout: timedelta) -> None:
    """Sets the timeout of every group created from now on, including those that libraries create.

    SAT's groups and DeepSpeed's clone of the world, which carries most of the traffic, would otherwise keep
    torch's default: 10 minutes with NCCL, 30 with gloo.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]  # not exported


def _lay_out(
    env: RankEnv, device: torch.device, backend: str, store: Store, model_parallel_size: int
) -> ProcessMesh:
    global _mesh
    with _quiet_sat(env):
        from sat import mpu

        mpu.initialize_model_parallel(model_parallel_size)
    _mesh = ProcessMesh(
        rank=env.rank,
        local_rank=env.local_rank,
        world_size=env.world_size,
        data_rank=mpu.get_data_parallel_rank(),
        data_size=mpu.get_data_parallel_world_size(),
        data_group=mpu.get_data_parallel_group(),
        model_rank=mpu.get_model_parallel_rank(),
        model_size=mpu.get_model_parallel_world_size(),
        model_group=mpu.get_model_parallel_group(),
        device=device,
        backend=backend,
        store=store,
    )
    return _mesh


@contextlib.contextmanager
def _quiet_sat(env: RankEnv) -> Iterator[None]:
    """Sets LOCAL_WORLD_SIZE, which SAT would guess, and hides the TorchScript warning of its import."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(env.local_world_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if before is None:
            del os.environ["LOCAL_WORLD_SIZE"]
        else:
            os.environ["LOCAL_WORLD_SIZE"] = before

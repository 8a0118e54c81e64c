"""Starts and stops the process group, and lays the processes out as a grid of data and model axes."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import sat_train.distributed.sat_packages  # noqa: F401
from sat_train.distributed.environment import RankEnv
from sat_train.errors import LaunchError

_BACKENDS = {"cuda": ("nccl", "gloo"), "cpu": ("gloo",)}


@dataclass(frozen=True)
class ProcessGrid:
    """The processes as a grid: `rank = data_rank * model_size + model_rank`.

    Args:
        rank: Global rank.
        local_rank: Rank on this machine.
        world_size: Processes in all: `data_size * model_size`.
        data_rank: Position on the data axis: which samples this process sees.
        data_size: Processes on the data axis.
        data_group: Those that hold the same slice of the model and see other samples.
        model_rank: Position on the model axis: which slice of the weights this process holds.
        model_size: Processes on the model axis.
        model_group: Those that see the same samples and hold other slices of the model.
        device: Where this process computes.
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
    store: dist.Store


_grid: ProcessGrid | None = None


def start_processes(
    env: RankEnv,
    *,
    device: str = "auto",
    backend: str = "auto",
    model_parallel_size: int = 1,
    timeout_minutes: float = 30,
) -> ProcessGrid:
    """Joins this process to the others and makes the groups, `sat.mpu`'s among them.

    A single process gets an in-memory store: no network, no port.

    Args:
        env: Who this process is.
        device: `auto`, `cuda` or `cpu`; `auto` takes CUDA where there is a device.
        backend: `auto`, `nccl` or `gloo`; `auto` takes NCCL on CUDA and gloo on the CPU.
        model_parallel_size: Processes that share one copy of the model; must divide the world size.
        timeout_minutes: How long a collective may wait for a rank.

    Raises:
        LaunchError: The layout, device or backend is impossible, or the other processes were not found.

    Ranks: all.
    """
    assert _grid is None, "the processes have been started already"
    where = _choose_device(device, env)
    chosen_backend = _choose_backend(backend, where)
    if env.world_size % model_parallel_size:
        raise LaunchError(
            f"args.model_parallel_size = {model_parallel_size} with {env.world_size} processes",
            expected="a divisor of the number of processes",
        )
    _prepare_deepspeed(env, where)
    store = _join(env, chosen_backend, timedelta(minutes=timeout_minutes))
    return _lay_out(env, where, chosen_backend, store, model_parallel_size)


def start_single_process(device: str = "cpu") -> ProcessGrid:
    """Returns a grid of this process alone, without environment or network; the one that is up, if any.

    For meta builds, tools and unit tests: SAT's layers ask `sat.mpu` for their sizes when they are built.
    """
    if _grid is not None:
        assert _grid.world_size == 1, "this process is one of several"
        return _grid
    return start_processes(RankEnv.single(), device=device)


def stop_processes() -> None:
    """Leaves the process group, if there is one. Does not wait for the other ranks."""
    global _grid
    if _grid is None:
        return
    from sat import mpu

    mpu.destroy_model_parallel()
    dist.destroy_process_group()
    _forget_groups_in_deepspeed()
    _grid = None


def _forget_groups_in_deepspeed() -> None:
    """DeepSpeed keeps groups in module variables and would take the dead ones at the next start."""
    comm, groups = (sys.modules.get(f"deepspeed.{name}") for name in ("comm.comm", "utils.groups"))
    if comm is not None and groups is not None:
        comm.cdb = groups.mpu = groups.mesh_device = None
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def _choose_device(device: str, env: RankEnv) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise LaunchError("args.device = cuda", expected="a CUDA device", remedy="use args.device=cpu")
    if env.local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"process {env.local_rank} of this machine has no GPU of its own",
            expected=f"at most {torch.cuda.device_count()} processes on this machine",
            remedy="lower --nproc_per_node, or look at CUDA_VISIBLE_DEVICES",
        )
    where = torch.device("cuda", env.local_rank)
    torch.cuda.set_device(where)
    return where


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
    """DeepSpeed reads these when it is imported and initialised, whoever has started the processes."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = str(env.local_rank)


def _join(env: RankEnv, backend: str, timeout: timedelta) -> dist.Store:
    store = dist.HashStore() if env.world_size == 1 else _meet(env, timeout)
    _default_timeout(timeout)
    dist.init_process_group(backend, store=store, rank=env.rank, world_size=env.world_size, timeout=timeout)
    return store


def _default_timeout(timeout: timedelta) -> None:
    """Gives the timeout to every group made from now on, also by libraries, which name none.

    SAT's groups and DeepSpeed's clone of the world, which carries most of the traffic, would otherwise keep
    torch's own: 10 minutes with NCCL, 30 with gloo, whatever the run asks for.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


def _meet(env: RankEnv, timeout: timedelta) -> dist.Store:
    url = f"tcp://{env.master_addr}:{env.master_port}"
    try:
        store, _, _ = next(dist.rendezvous(url, env.rank, env.world_size, timeout=timeout))
    except (dist.DistError, OSError) as error:
        raise LaunchError(
            f"rank {env.rank} of {env.world_size} did not reach {url}: {str(error).splitlines()[0]}",
            remedy="see that all machines started, that the address is reachable and that the port is free",
        ) from error
    return store


def _lay_out(
    env: RankEnv, device: torch.device, backend: str, store: dist.Store, model_parallel_size: int
) -> ProcessGrid:
    global _grid
    with _quiet_sat(env):
        from sat import mpu

        mpu.initialize_model_parallel(model_parallel_size)
    _grid = ProcessGrid(
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
    return _grid


@contextlib.contextmanager
def _quiet_sat(env: RankEnv) -> Iterator[None]:
    """SAT guesses LOCAL_WORLD_SIZE when it is missing, and its import warns of deprecated TorchScript."""
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

"""Connects the processes of a run: a key-value store that all of them share, and the roll call in it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

# torch.distributed has these, but does not export them to type checkers
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from sat_train.distributed.environment import RankEnv
from sat_train.errors import LaunchError


@dataclass(frozen=True)
class ProcessLocation:
    """Machine, process and GPU of a rank.

    Args:
        host: Host name.
        pid: Process id.
        gpu: Identity of its GPU, the same for all processes that would share it; empty on the CPU.
    """

    host: str
    pid: int
    gpu: str = ""


def meet(env: RankEnv, timeout: timedelta) -> Store:
    """Returns the store that all ranks of the run share; a single process needs no network for it.

    Rank 0 or torchrun holds the store. This does not wait for the other ranks; `call_the_roll` does.

    Raises:
        LaunchError: The store was not reached in time.
    """
    if env.world_size == 1:
        return HashStore()
    is_torchrun_s = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            env.master_addr,
            env.master_port,
            env.world_size,
            is_master=env.rank == 0 and not is_torchrun_s,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise LaunchError(
            f"rank {env.rank} of {env.world_size} did not reach tcp://{env.master_addr}:{env.master_port}: "
            f"{str(error).splitlines()[0]}",
            remedy="check that all machines started, that the address is reachable and that the port is free",
        ) from error
    return PrefixStore(_keys_of_this_run(env), store)


def _keys_of_this_run(env: RankEnv) -> str:
    """Returns a key prefix, so that ranks that reach another run's store by its port do not disturb it."""
    if env.launcher == "slurm":
        return f"sat_train/{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"
    # torchrun may restart the ranks on the same store
    return f"sat_train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def announce(store: Store, env: RankEnv, gpu: str = "") -> None:
    """Announces the location of this rank to the others."""
    location = ProcessLocation(socket.gethostname(), os.getpid(), gpu)
    store.set(location_key(env.rank), json.dumps(asdict(location)))


def call_the_roll(store: Store, env: RankEnv, timeout: timedelta) -> list[ProcessLocation]:
    """Waits until every rank has announced itself.

    Returns:
        The location of each rank.

    Raises:
        LaunchError: Ranks are late (named in the message), or two would share a GPU.

    Ranks: all.
    """
    keys = [location_key(rank) for rank in range(env.world_size)]
    try:
        store.wait(keys, timeout)
    except RuntimeError:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        raise LaunchError(
            f"{len(missing)} of {env.world_size} ranks did not come within "
            f"{timeout.total_seconds() / 60:g} minutes: {', '.join(missing)}",
            remedy="check that all machines started and reach "
            f"{env.master_addr}:{env.master_port}; args.distributed_timeout_minutes sets the time to wait",
        ) from None
    locations = [read_location(store, rank) for rank in range(env.world_size)]
    _check_gpus(locations)
    return locations


def location_key(rank: int) -> str:
    """Returns the key of a rank's location."""
    return f"location/{rank}"


def read_location(store: Store, rank: int) -> ProcessLocation:
    """Returns the location of a rank, which must have announced itself."""
    return ProcessLocation(**json.loads(store.get(location_key(rank))))


def pulse_key(rank: int) -> str:
    """Returns the key of a rank's heartbeat."""
    return f"alive/{rank}"


def read_pulse(store: Store, rank: int) -> bytes:
    """Returns the last heartbeat of a rank, empty before its first; a rank that lives changes it."""
    return store.get(pulse_key(rank)) if store.check([pulse_key(rank)]) else b""


def _check_gpus(locations: Sequence[ProcessLocation]) -> None:
    """Refuses two processes on one GPU, however each of them was assigned it."""
    first: dict[str, int] = {}
    for rank, location in enumerate(locations):
        if location.gpu and first.setdefault(location.gpu, rank) != rank:
            raise LaunchError(
                f"ranks {first[location.gpu]} and {rank} have the same GPU "
                f"({location.gpu} on {location.host})",
                expected="a GPU of its own for each process",
                remedy="start as many processes as there are GPUs, or check CUDA_VISIBLE_DEVICES",
            )

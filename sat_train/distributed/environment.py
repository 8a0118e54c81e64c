"""Reads the rank of this process from the launcher's environment variables."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sat_train.errors import LaunchError
from sat_train.files import write_text

_LOOPBACK = "127.0.0.1"
_DEFAULT_PORT = 29500
# First port and number of ports, below the system's ephemeral range. The job and step numbers choose one, so
# that two jobs on a machine do not share a port.
_SLURM_PORTS = (20000, 10000)
_STEP_STRIDE = 97


@dataclass(frozen=True)
class RankEnv:
    """Rank of one process in the launch.

    Args:
        rank: Global rank, `0 <= rank < world_size`.
        local_rank: Rank on this machine; also the index of its GPU.
        world_size: Processes in the launch.
        local_world_size: Processes on this machine.
        master_addr: Host of rank 0; empty for a single process, which needs no network.
        master_port: Port on that host; 0 for a single process.
        launcher: `torchrun`, `slurm`, `openmpi` or `single`.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str

    def __post_init__(self) -> None:
        _check_range("rank", self.rank, self.world_size)
        _check_range("local rank", self.local_rank, self.local_world_size)
        if self.local_world_size > self.world_size:
            raise LaunchError(
                f"{self.local_world_size} processes on this machine, but {self.world_size} in all",
                expected="local world size <= world size",
                remedy="start all processes with one launcher: torchrun, srun or mpirun",
            )

    @classmethod
    def single(cls) -> RankEnv:
        """Returns the environment of a single process."""
        return cls(0, 0, 1, 1, "", 0, "single")

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> RankEnv:
        """Reads the variables of torchrun, OpenMPI or SLURM, in this order; none of them means one process.

        torchrun comes first because srun or mpirun may have started one torchrun per machine.

        Args:
            environ: Variables to read instead of `os.environ`.

        Raises:
            LaunchError: Variables of the launcher are missing, not numbers, or contradictory.
        """
        variables = os.environ if environ is None else environ
        if "RANK" in variables or "WORLD_SIZE" in variables:
            env = _read_torchrun(variables)
            if "TORCHELASTIC_RUN_ID" not in variables:
                _check_agrees(env, variables)
            return env
        if "OMPI_COMM_WORLD_RANK" in variables:
            return _read_openmpi(variables)
        if "SLURM_STEP_ID" in variables and "SLURM_PROCID" in variables:
            return _read_slurm(variables)
        return cls.single()


def _check_range(name: str, value: int, size: int) -> None:
    if not 0 <= value < size:
        raise LaunchError(
            f"{name} {value} of {size} processes",
            expected=f"0 <= {name} < {size}",
            remedy="unset RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE left over from another launch",
        )


def _integer(variables: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", variables[name].strip()):
        raise LaunchError(f"{name}={_short(variables[name])}", expected="an integer of at most ten digits")
    return int(variables[name])


def _port(variables: Mapping[str, str]) -> int:
    port = _integer(variables, "MASTER_PORT")
    if not 1 <= port <= 65535:
        raise LaunchError(f"MASTER_PORT={port}", expected="a port from 1 to 65535")
    return port


def _host(variables: Mapping[str, str]) -> str:
    host = variables["MASTER_ADDR"].strip()
    if not re.fullmatch(r"[\w.:%-]{1,255}", host, flags=re.ASCII):
        raise LaunchError(f"MASTER_ADDR={_short(host)}", expected="a host name or address")
    return host


def _short(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:60] + "...")


def _require(variables: Mapping[str, str], launcher: str, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not variables.get(name, "").strip()]
    if missing:
        raise LaunchError(
            f"{launcher} variables are incomplete: {', '.join(missing)} not set",
            expected=", ".join(names),
            remedy="start with torchrun, or unset RANK and WORLD_SIZE for a single process",
        )


def _read_torchrun(variables: Mapping[str, str]) -> RankEnv:
    # the deepspeed launcher sets LOCAL_SIZE instead of torchrun's LOCAL_WORLD_SIZE
    local_size = "LOCAL_SIZE" if "LOCAL_SIZE" in variables else "LOCAL_WORLD_SIZE"
    _require(
        variables, "torchrun", ("RANK", "LOCAL_RANK", "WORLD_SIZE", local_size, "MASTER_ADDR", "MASTER_PORT")
    )
    return RankEnv(
        rank=_integer(variables, "RANK"),
        local_rank=_integer(variables, "LOCAL_RANK"),
        world_size=_integer(variables, "WORLD_SIZE"),
        local_world_size=_integer(variables, local_size),
        master_addr=_host(variables),
        master_port=_port(variables),
        launcher="torchrun",
    )


def _read_openmpi(variables: Mapping[str, str]) -> RankEnv:
    prefix = "OMPI_COMM_WORLD_"
    _require(
        variables, "OpenMPI", tuple(prefix + name for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    )
    world_size = _integer(variables, prefix + "SIZE")
    local_world_size = _integer(variables, prefix + "LOCAL_SIZE")
    if "MASTER_ADDR" not in variables and local_world_size < world_size:
        raise LaunchError(
            f"OpenMPI started {world_size} processes on several machines and MASTER_ADDR is not set",
            remedy="mpirun -x MASTER_ADDR=<host of rank 0> ...",
        )
    return RankEnv(
        rank=_integer(variables, prefix + "RANK"),
        local_rank=_integer(variables, prefix + "LOCAL_RANK"),
        world_size=world_size,
        local_world_size=local_world_size,
        master_addr=_host(variables) if "MASTER_ADDR" in variables else _LOOPBACK,
        master_port=_port(variables) if "MASTER_PORT" in variables else _DEFAULT_PORT,
        launcher="openmpi",
    )


def _read_slurm(variables: Mapping[str, str]) -> RankEnv:
    names = (
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_STEP_TASKS_PER_NODE",
    )
    _require(variables, "SLURM", (*names, "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID"))
    tasks_per_node = _expand_tasks(variables["SLURM_STEP_TASKS_PER_NODE"])
    node = _integer(variables, "SLURM_NODEID")
    _check_range("SLURM_NODEID", node, len(tasks_per_node))
    return RankEnv(
        rank=_integer(variables, "SLURM_PROCID"),
        local_rank=_integer(variables, "SLURM_LOCALID"),
        world_size=_integer(variables, "SLURM_STEP_NUM_TASKS"),
        local_world_size=tasks_per_node[node],
        master_addr=_host(variables)
        if variables.get("MASTER_ADDR")
        else _first_host(variables["SLURM_STEP_NODELIST"]),
        master_port=_port(variables) if "MASTER_PORT" in variables else _slurm_port(variables),
        launcher="slurm",
    )


def _slurm_port(variables: Mapping[str, str]) -> int:
    first, count = _SLURM_PORTS
    job, step = _integer(variables, "SLURM_JOB_ID"), _integer(variables, "SLURM_STEP_ID")
    return first + (job + _STEP_STRIDE * step) % count


def _expand_tasks(text: str) -> list[int]:
    """Expands SLURM's number of tasks per machine: `2(x3),1` -> `[2, 2, 2, 1]`."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part.strip())
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={_short(text)}", expected="a list such as 8(x4),2")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _first_host(nodelist: str) -> str:
    """Returns the first machine of a SLURM node list: `gpu[03-07,9],big1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,]*)", nodelist)
    if match is None:
        raise LaunchError(f"SLURM_STEP_NODELIST={_short(nodelist)}", expected="a list such as gpu[03-07]")
    return match[1] + (match[2] or "") + match[3]


def _check_agrees(env: RankEnv, variables: Mapping[str, str]) -> None:
    """Refuses a RANK, exported by hand, that contradicts the launcher of this process.

    Every task of an srun would take itself for that rank, and wait for the others forever.
    """
    for launcher, marker, reader in (
        ("mpirun", "OMPI_COMM_WORLD_RANK", _read_openmpi),
        ("srun", "SLURM_STEP_ID", _read_slurm),
    ):
        if marker not in variables:
            continue
        other = reader(variables)
        if (env.rank, env.world_size) != (other.rank, other.world_size):
            raise LaunchError(
                f"RANK={env.rank} WORLD_SIZE={env.world_size}, but {launcher} says rank {other.rank} of "
                f"{other.world_size}",
                expected="one answer",
                remedy=f"unset RANK and WORLD_SIZE, so that {launcher}'s variables are used",
            )


def tell_torchrun(message: str, time: int) -> None:
    """Makes torchrun's own summary, which is printed last, end with this message.

    Args:
        time: Seconds since 1970; torchrun takes the earliest failure as the cause.

    Source: pytorch/pytorch `torch/distributed/elastic/multiprocessing/errors/__init__.py` `ProcessFailure`.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        Path(path).write_text(json.dumps({"message": message, "timestamp": time}))


def tell_batch_script(run_directory: Path) -> None:
    """Writes the run directory into the file that `SAT_TRAIN_RUN_FILE` names, for the batch script.

    Raises:
        LaunchError: The file cannot be written, so the script could not resume the run.
    """
    path = os.environ.get("SAT_TRAIN_RUN_FILE")
    if path:
        try:
            write_text(Path(path), f"{run_directory.resolve()}\n")
        except OSError as error:
            raise LaunchError(
                f"SAT_TRAIN_RUN_FILE={_short(path)}: {error.strerror}", expected="a file that can be written"
            ) from None

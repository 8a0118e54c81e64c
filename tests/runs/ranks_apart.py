"""Ranks without a launcher: whoever starts them ends none of them, so they must end by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sat_train.testing.ports import HeldPort
from tests.forks import ForkedCommand, start_python
from tests.runs.launching import ROOT

# What a rank does once the ranks have met; `argv[1]` is a body of Python.
WORK = """
import sys, time
import torch, torch.distributed as dist
from types import SimpleNamespace
from sat_train.cli.ranks import _join_and_work
from sat_train.distributed.environment import RankEnv
def work(config, mesh):
    exec(sys.argv[1])
sys.modules["work"] = SimpleNamespace(work=work)
args = SimpleNamespace(device="cpu", distributed_backend="auto", model_parallel_size=1,
                       distributed_timeout_minutes=float(sys.argv[2]))
sys.exit(_join_and_work(SimpleNamespace(args=args), RankEnv.read(), ("work", "work")))
"""

_held_ports: list[HeldPort] = []  # until the tests end: a rank may come late, or be started again


def start_ranks(words: Callable[[int], Sequence[str]], *, world_size: int, logs: Path) -> list[ForkedCommand]:
    """Starts `python <words(rank)>` for each rank, whose output goes to `<logs>/<rank>.txt`."""
    port = HeldPort()
    _held_ports.append(port)
    ranks = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        variables = {name: str(value) for name, value in {**place, "MASTER_PORT": port.number}.items()}
        variables["MASTER_ADDR"] = "127.0.0.1"
        ranks.append(start_python(words(rank), log=logs / f"{rank}.txt", variables=variables))
    return ranks


def start_work(body: str, *, world_size: int, minutes: float, logs: Path) -> list[ForkedCommand]:
    """Starts ranks that run `body` with `mesh`, `dist`, `torch` and `time` in scope."""
    return start_ranks(lambda rank: ["-c", WORK, body, str(minutes)], world_size=world_size, logs=logs)


def run_ranks(script: str, words: Sequence[str], *, world_size: int, folder: Path) -> str:
    """Runs a launch script on so many ranks to its end, which must be a good one; returns what they print."""
    folder.mkdir(parents=True, exist_ok=True)
    line = [str(ROOT / "launch" / script), *words]
    ranks = start_ranks(lambda rank: line, world_size=world_size, logs=folder)
    codes = end_all(ranks, timeout_s=300)
    output = "\n".join((folder / f"{rank}.txt").read_text(encoding="utf-8") for rank in range(world_size))
    assert codes == [0] * world_size, output
    return output


def end_all(ranks: Sequence[ForkedCommand], *, timeout_s: float) -> list[int]:
    """Waits for all ranks and returns their exit codes; kills those that do not end."""
    try:
        return [rank.wait(timeout=timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()

"""Times the saves of a run: blocking, as they were before, and from a copy while the loop continues.

    python benchmarks/saves.py                                # 1 GB, 7 rounds, in the temporary folder
    python benchmarks/saves.py --mb 4096 --folder /scratch/me
    python benchmarks/saves.py --zero3 --folder /dev/shm      # two ranks, which hold a half of each weight

A round saves the same state three ways, one after the other: as a save was written before (torch's CRC-32,
and SHA-256 in the writing thread), as it is written today, and in the background of a loop of matrix
products. The stall is the time in which that loop stood still: to begin, at the end of its first step for
what was left of the copy, as an update waits for it, and for the commit once the files are there. The
slowdown is what its products took longer meanwhile, as copying, writing and hashing need a core. A step takes
half a second, four to five times the copy of 1 GB; one of 5B on eight GPUs takes 2.5 s, and the copy at
20 GB/s from 0.4 s to 1 s.

At ZeRO-3 each of two ranks saves from an engine of DeepSpeed; the times are those of the first rank, which
merges the weights of both. In place of a save as before, the weights are gathered to its host memory,
parameter by parameter, for which the loop used to stand still.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from sat_train import files
from sat_train.checkpoint import save, torch_file
from sat_train.checkpoint.background import BackgroundWriter
from sat_train.checkpoint.fragments import Fragment, read_fragments
from sat_train.checkpoint.layout import fragments_file_name
from sat_train.checkpoint.manifest import Manifest, read_manifest, verify_checkpoint
from sat_train.checkpoint.run_state import RunState
from sat_train.cli.main import run_cli
from sat_train.cli.options import positive
from sat_train.distributed.collectives import gather_objects
from sat_train.distributed.processes import ProcessMesh, start_single_process
from sat_train.engine.engine import TrainEngine
from sat_train.testing.pool import RankPool

_FRAGMENTS = 20
_STEP_S = 0.5
_BYTES = 14  # of a weight: bf16, and three times fp32


@dataclass(frozen=True)
class Round:
    """Seconds of one round.

    Args:
        before: A blocking save with CRC-32 and hashing in the same thread; at ZeRO-3, gathering the weights.
        blocking: A blocking save.
        copy: Of a save in the background, the beginning, and what a first update waited for the copy.
        commit: Of a save in the background, the commit.
        writing: From the beginning to the end of writing.
        slowdown: Of the steps meanwhile.
    """

    before: float
    blocking: float
    copy: float
    commit: float
    writing: float
    slowdown: float

    @property
    def stall(self) -> float:
        """Share of a blocking save in which the loop stands still."""
        return (self.copy + self.commit) / self.blocking


def make_state(megabytes: int) -> RunState:
    """Returns weights in bf16 with their masters and two moments."""
    count = megabytes * 10**6 // _BYTES // _FRAGMENTS
    kinds = ("master", "exp_avg", "exp_avg_sq")
    names = [f"layer.{number}" for number in range(_FRAGMENTS)]
    fragments = [Fragment(name, (count,), 0, {kind: torch.rand(count) for kind in kinds}) for name in names]
    return RunState({name: torch.rand(count).bfloat16() for name in names}, fragments, {})


class Saves:
    """Saves of a state into a folder.

    Args:
        mesh: The process mesh.
        read_state: Returns the state of this rank.
        folder: An existing folder.
    """

    def __init__(self, mesh: ProcessMesh, read_state: Callable[[], RunState], folder: Path) -> None:
        self._mesh, self._read_state, self._folder = mesh, read_state, folder
        self._writer = BackgroundWriter(only_with_room=False)
        self._step = 0
        self._work = torch.rand(512, 512)

    def begin(self, *, in_background: bool) -> Callable[[], Path]:
        self._step += 1
        manifest = Manifest(
            step=self._step,
            samples_consumed=0,
            world_size=self._mesh.world_size,
            data_size=self._mesh.data_size,
            model_size=1,
            dtype="bf16",
            trainable_only=False,
            config_digest="",
            data_fingerprint="",
            base_weights=None,
            versions={},
        )
        return save.begin_save(
            self._mesh,
            state=self._read_state(),
            run_directory=self._folder,
            manifest=manifest,
            writer=self._writer if in_background else None,
        )

    def blocking(self) -> float:
        """Returns the seconds of a blocking save."""
        gather_objects(self._mesh, None)  # the ranks begin together
        begin = time.perf_counter()
        folder = self.begin(in_background=False)()
        seconds = time.perf_counter() - begin
        self._remove(folder)
        return seconds

    def in_background(self) -> tuple[float, float, float, float]:
        """Returns the seconds of copy, commit and writing, and the slowdown of the steps meanwhile."""
        alone = statistics.median(self._seconds_of_a_product() for _ in range(50))
        gather_objects(self._mesh, None)
        begin = time.perf_counter()
        commit = self.begin(in_background=True)
        begun = time.perf_counter()
        slowdown, stall = 0.0, begun - begin
        while self._writer.is_writing:
            for _ in range(int(_STEP_S / alone)):
                slowdown += self._seconds_of_a_product() - alone
            stall += _seconds(self._writer.wait_until_copied)
        written = time.perf_counter()
        folder = commit()
        committed = time.perf_counter()
        self._remove(folder)
        return stall, committed - written, written - begun, slowdown

    def _remove(self, folder: Path) -> None:
        if self._mesh.rank == 0:
            assert read_manifest(folder).step == self._step
            shutil.rmtree(folder)

    def _seconds_of_a_product(self) -> float:
        return _seconds(lambda: self._work @ self._work)


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


@contextmanager
def as_before() -> Iterator[None]:
    """Writes with torch's CRC-32, and hashes in the thread that writes."""
    fast, apart = torch_file._saving_fast, files._HASHED_APART
    torch_file._saving_fast, files._HASHED_APART = _unchanged, 2**62  # type: ignore[assignment]
    try:
        yield
    finally:
        torch_file._saving_fast, files._HASHED_APART = fast, apart


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


def measure(saves: Saves) -> Round:
    """Saves three ways."""
    with as_before():
        before = saves.blocking()
    return _measure(saves, before)


def _measure(saves: Saves, before: float) -> Round:
    blocking = saves.blocking()
    copy, commit, writing, slowdown = saves.in_background()
    return Round(before, blocking, copy, commit, writing, slowdown)


def build_divided(mesh: ProcessMesh, megabytes: int) -> TrainEngine:
    """Returns an engine at ZeRO-3 in bf16 that has stepped once, with a state of that size on all ranks."""
    from sat_train.engine.build import start_engine

    width = math.isqrt(megabytes * 10**6 // _BYTES // _FRAGMENTS)
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(_FRAGMENTS)]
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    model = torch.nn.Sequential(*layers).bfloat16()
    engine = start_engine(model, lambda named: torch.optim.AdamW(list(named.values())), settings, mesh)
    engine.backward(engine(torch.ones(1, width, dtype=torch.bfloat16)).float().square().mean())
    engine.step(1e-4)
    return engine


def gather(engine: TrainEngine, mesh: ProcessMesh) -> list[torch.Tensor]:
    """Gathers one parameter at a time, to host memory of the first rank."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    whole = []
    for parameter in engine.module.parameters():
        with GatheredParameters([parameter]):
            if mesh.rank == 0:
                whole.append(parameter.detach().to("cpu", copy=True))
    return whole


def measure_divided(mesh: ProcessMesh, folder: Path, megabytes: int, rounds: int) -> list[tuple[float, ...]]:
    """Returns rounds at ZeRO-3, of this rank. Ranks: all."""
    engine = build_divided(mesh, megabytes)
    state = lambda: RunState(None, engine.fragments(), {}, engine.pieces())  # noqa: E731
    saves = Saves(mesh, state, folder)
    measured = [
        _measure(saves, _seconds(lambda: gather(engine, mesh))) for _ in range(rounds + 1)
    ]  # the first one allocates the copy
    return [astuple(each) for each in measured[1:]]


def memory_of_a_resume(megabytes: int) -> float:
    """Returns the host memory that a process takes to fill its state from a checkpoint, above that state.

    Pages of the mapped file are counted too, although the system may take them back.

    Returns:
        As a share of the file.
    """
    state = make_state(megabytes)
    with tempfile.TemporaryDirectory() as folder:
        saved = Saves(start_single_process(), lambda: state, Path(folder)).begin(in_background=False)()
        size = (saved / fragments_file_name(0)).stat().st_size
        taken = (
            multiprocessing.get_context("spawn")
            .Pool(1)
            .apply(_taken_by_a_resume, (saved, state_shape(state)))
        )
    return taken / size


def _taken_by_a_resume(folder: Path, kinds: dict[tuple[str, str], int]) -> int:
    """Copies all fragments of a step into memory that is there already; returns the bytes taken besides."""
    state = {key: torch.ones(count) for key, count in kinds.items()}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before = _peak_bytes()
    fragments = read_fragments(folder, verify_checkpoint(folder), model_rank=0, model_size=1)
    for (name, kind), tensor in state.items():
        tensor.copy_(fragments.read(name, kind, offset=0, count=tensor.numel()))
    return _peak_bytes() - before


def _peak_bytes() -> int:
    """Returns the most bytes that were resident at once, pages of mapped files included."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def state_shape(state: RunState) -> dict[tuple[str, str], int]:
    """Returns the number of elements of each kind of state of each parameter."""
    return {(each.name, kind): run.numel() for each in state.fragments for kind, run in each.tensors.items()}


def _rounds_at_zero3(folder: Path, megabytes: int, rounds: int) -> list[Round]:
    pool = RankPool()
    try:
        return [
            Round(*each)
            for each in pool.run(2, measure_divided, folder, megabytes, rounds, timeout_s=3600)[0]
        ]
    finally:
        pool.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mb", type=positive(int, 1_000_000), default=1000, help="size of the state in 1e6 bytes"
    )
    parser.add_argument("--rounds", type=positive(int, 1000), default=7)
    parser.add_argument("--folder", type=Path, help="where to save; removed afterwards")
    parser.add_argument("--zero3", action="store_true", help="two ranks at ZeRO-3")
    options = parser.parse_args()
    if options.folder and not options.folder.is_dir():
        parser.error(f"--folder {options.folder}: expected a folder that exists")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.zero3:
            rounds = _rounds_at_zero3(Path(folder), options.mb, options.rounds)
        else:
            state = make_state(options.mb)
            saves = Saves(start_single_process(), lambda: state, Path(folder))
            measure(saves)  # allocates the copy
            rounds = [measure(saves) for _ in range(options.rounds)]

    def median(number: Callable[[Round], float]) -> str:
        values = sorted(map(number, rounds))
        return f"{statistics.median(values):6.2f}  ({values[0]:.2f} to {values[-1]:.2f})"

    print(f"{options.mb} MB, {len(rounds)} rounds: median (lowest to highest)")
    print(
        "gathering, s               " if options.zero3 else "as before, s               ",
        median(lambda each: each.before),
    )
    print("blocking, s                ", median(lambda each: each.blocking))
    print("blocking, MB/s             ", median(lambda each: options.mb / each.blocking))
    if options.zero3:
        print("gathering, share of blocking", median(lambda each: each.before / each.blocking))
    else:
        print("throughput against before  ", median(lambda each: each.before / each.blocking))
    print("copy, s                    ", median(lambda each: each.copy))
    print("commit, s                  ", median(lambda each: each.commit))
    print("stall, share of blocking   ", median(lambda each: each.stall))
    print("written after, s           ", median(lambda each: each.writing))
    print("slowdown meanwhile, share  ", median(lambda each: each.slowdown / each.writing))
    if not options.zero3:
        print(f"memory of a resume, share of its file: {memory_of_a_resume(options.mb):.2f}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))

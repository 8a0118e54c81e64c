"""A fault on any rank is shown, with its name, and ends all ranks soon, also where no launcher ends them."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import ForkedCommand
from tests.runs.launching import BIN, ROOT, SMALL, metrics, run_directories, run_words, start, wait_until
from tests.runs.ranks_apart import WORK, end_all, start_ranks, start_work

HOURS = 60  # far longer than any of these tests may take
DEMO = ROOT / "sat_train" / "assets" / "demo" / "train"
STEPS = """
for step in range(10 ** 6):
    dist.all_reduce(torch.ones(1))
    open(f"{FOLDER}/{mesh.rank}.step", "w").close()
    time.sleep(0.05)
"""


Strike = tuple[signal.Signals, int]
Run = tuple[Path, list[ForkedCommand]]


@pytest.fixture(scope="module", autouse=True)
def struck(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Strike, Run]]:
    """Four runs that have lost a rank; they wait for their time limit while the other tests run."""
    runs: dict[Strike, Run] = {}
    for number, lost in itertools.product((signal.SIGSTOP, signal.SIGKILL), (0, 1)):
        folder = tmp_path_factory.mktemp(f"{number.name}-{lost}")
        body = f"FOLDER = {str(folder)!r}\n{STEPS}"
        runs[number, lost] = folder, start_work(body, world_size=2, minutes=0.25, logs=folder)
    for (number, lost), (folder, ranks) in runs.items():
        wait_until(lambda folder=folder: len(list(folder.glob("*.step"))) == 2)
        os.kill(ranks[lost].pid, number)
    yield runs
    for _, ranks in runs.values():
        for rank in ranks:
            rank.kill()
            rank.wait()


def outputs(folder: Path, world_size: int = 2) -> str:
    return "\n".join((folder / f"{rank}.txt").read_text(encoding="utf-8") for rank in range(world_size))


def train_words(folder: Path, broken: int) -> list[str]:
    """Words that are a fault on one rank: the disk with its data is not mounted there."""
    for rank in {0, 1} - {broken}:
        (folder / f"disk{rank}").symlink_to(DEMO)
    base = ["launch/train_video.py", "--base", "configs/sft.yaml", f"args.save={folder / 'runs'}"]
    return [*base, "args.train_iters=1", f"args.train_data=[{folder}/disk$RANK]"]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_configuration_fault_on_one_rank_ends_all(tmp_path: Path, broken: int) -> None:
    words = train_words(tmp_path, broken)
    ranks = start_ranks(
        lambda rank: [word.replace("$RANK", str(rank)) for word in words], world_size=2, logs=tmp_path
    )
    assert end_all(ranks, timeout_s=240) == [2, 2]
    output = outputs(tmp_path)
    assert output.count(f"disk{broken}") == 1, output
    assert ("rank 1: " in output) is (broken == 1)
    assert "Traceback" not in output


def test_torchrun_ends_with_the_fault_of_rank_1(tmp_path: Path) -> None:
    line = " ".join([f"exec {BIN / 'python'}", *train_words(tmp_path, 1)])
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "--no-python"]
    done = run_words([*torchrun, "bash", "-c", line], timeout_s=240)
    assert done.returncode == 1
    before, _, summary = done.output.partition("Root Cause")
    assert "rank 1: 1 fault in the configuration" in before
    assert "traceback : rank 1: 1 fault in the configuration" in summary
    assert "disk1" in summary.splitlines()[-2], done.output


@pytest.mark.parametrize(
    ("body", "codes", "message"),
    [
        ("if mesh.rank == 1: raise ValueError('broken here')\ntime.sleep(999)", [1, 1], "broken here"),
        (
            "from sat_train.errors import DataError\n"
            "from sat_train.distributed.collectives import check_all_ranks\n"
            "check_all_ranks(mesh, DataError('no clip here') if mesh.rank == 1 else None)",
            [2, 2],
            "rank 1: no clip here",
        ),
    ],
)
def test_a_failure_at_work_is_shown_once_and_all_ranks_end_alike(tmp_path, body, codes, message) -> None:
    ranks = start_work(body, world_size=2, minutes=HOURS, logs=tmp_path)
    assert end_all(ranks, timeout_s=240) == codes
    output = outputs(tmp_path)
    assert output.count(message) == 1, output
    assert "rank 1: " in output


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    ranks = start_ranks(
        lambda rank: ["-c", WORK, "", "0.05"] if rank == 0 else ["-c", ""], world_size=2, logs=tmp_path
    )
    assert end_all(ranks, timeout_s=240) == [2, 0]
    assert "1 of 2 ranks did not come within 0.05 minutes: 1" in outputs(tmp_path)


def test_ranks_that_lose_torchrun_save_and_end(tmp_path: Path) -> None:
    """SIGUSR1 kills a plain torchrun, and nobody else would tell its ranks."""
    words = ["--base", str(ROOT / "configs" / "sft.yaml"), f"args.save={tmp_path / 'runs'}"]
    words += ["args.log_interval=1", "args.eval_interval=null", "args.valid_video_interval=null", *SMALL]
    torchrun = start("train_video.py", words, processes=2, log=tmp_path / "log.txt")
    wait_until(lambda: any(metrics(folder) for folder in run_directories(tmp_path / "runs")))
    os.kill(torchrun.pid, signal.SIGUSR1)
    torchrun.wait()
    (folder,) = run_directories(tmp_path / "runs")
    try:
        wait_until(lambda: (folder / "PREEMPTED").exists(), timeout_s=240)
        wait_until(lambda: not (folder / "run.lock").exists(), timeout_s=240)
    finally:
        _kill_group(torchrun.pid)
    assert "has gone: rank 0 or its launcher was killed" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_rank_that_is_stopped_or_killed_is_named(struck: dict[Strike, Run]) -> None:
    for (_, lost), (folder, ranks) in struck.items():
        (code,) = end_all([ranks[1 - lost]], timeout_s=240)
        output = (folder / f"{1 - lost}.txt").read_text(encoding="utf-8")
        assert code == 1
        assert f"rank {lost}" in output or (lost == 0 and "the store of the run" in output), output
        assert "Traceback" not in output


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)

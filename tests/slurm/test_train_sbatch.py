"""`launch/slurm/train.sbatch` under a real SLURM: it finishes, saves when stopped, resumes its own run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forks import run_sat_train
from tests.runs.launching import ROOT, run_directories, training_lines
from tests.slurm.cluster import Cluster

DEMO = ROOT / "sat_train" / "assets" / "demo" / "train"
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
STEPS = 24  # a job is stopped after a few, and requeued a few later
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@dataclass(frozen=True)
class Job:
    """A job in the folder that it was submitted from."""

    cluster: Cluster
    number: str
    folder: Path

    @property
    def output(self) -> str:
        path = self.folder / f"slurm-{self.number}.out"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def run_directory(self) -> Path:
        return Path((self.folder / f"slurm-{self.number}.run").read_text(encoding="utf-8").strip())

    def steps(self) -> int:
        """Returns the last step that the run has logged."""
        try:
            return max(training_lines(self.run_directory), default=0)
        except FileNotFoundError:  # the run has not said yet where it is
            return 0

    def wait_for_steps(self, count: int) -> None:
        self.cluster.wait_for(lambda: self._is_alive() and self.steps() >= count)

    def wait(self) -> str:
        """Waits until the job has ended for good; returns its state."""
        self.cluster.wait_for(lambda: self.cluster.state(self.number) in ENDED)
        return self.cluster.state(self.number)

    def _is_alive(self) -> bool:
        state = self.cluster.state(self.number)
        assert state not in ENDED, f"{state}\n{self.output}"
        return True


@pytest.fixture(scope="module")
def words(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The words of every job; samples are encoded already, so that no task imports and loads T5."""
    folder = tmp_path_factory.mktemp("encoded")
    (folder / "clips").mkdir()
    for video in sorted((DEMO / "videos").glob("*.mp4"))[:6]:
        shutil.copy(video, folder / "clips")
        shutil.copy(DEMO / "labels" / f"{video.stem}.txt", folder / "clips")
    line = [
        *("--base", str(ROOT / "configs" / "sft.yaml"), f"args.train_data=[{folder / 'clips'}]"),
        *("args.valid_data=null", "args.split=100,0,0", "data.params.views=2"),
        *(f"data.cache_dir={folder / 'cache'}", f"args.train_iters={STEPS}", "args.save_interval=1000"),
        *("args.eval_interval=null", "args.valid_video_interval=null", "args.num_workers=0"),
        *("args.device=cpu", "args.log_interval=1", "args.tensorboard=false"),
    ]
    done = run_sat_train(["precompute", *line])
    assert done.returncode == 0, done.output
    return [*line, "data.cache=require"]


def submit(cluster: Cluster, folder: Path, words: Sequence[str], *, tasks: int = 1) -> Job:
    options = [f"--ntasks-per-node={tasks}", f"--gpus-per-node={tasks}", "--cpus-per-task=1"]
    return Job(cluster, cluster.submit(SCRIPT, options, words, cwd=folder), folder)


def losses(run_directory: Path) -> dict[int, object]:
    return {step: line["loss"] for step, line in training_lines(run_directory).items()}


def test_a_job_that_is_stopped_and_requeued_resumes_its_own_run_and_equals_one_that_never_stopped(
    cluster: Cluster, words: list[str], tmp_path: Path
) -> None:
    """Two jobs at once in one folder, which is neither the repository, nor `runs` where they save."""
    save = "args.save=kept here"
    stopped = submit(cluster, tmp_path, [*words, save, "args.save_interval=5"], tasks=2)
    stopped.wait_for_steps(3)
    straight = submit(cluster, tmp_path, [*words, save], tasks=2)
    cluster.send("scancel", "--batch", "--signal=USR1", stopped.number)
    cluster.wait_for(lambda: cluster.starts(stopped.number) == 1)
    reached = stopped.steps()
    stopped.wait_for_steps(max(reached + 1, 6))
    cluster.send("scontrol", "requeue", stopped.number)  # as after the loss of a node: no time to save
    assert [stopped.wait(), straight.wait()] == ["COMPLETED"] * 2, stopped.output + straight.output
    assert cluster.starts(stopped.number) == 2
    assert cluster.starts(straight.number) == 0
    first, second = run_directories(tmp_path / "kept here")
    assert list(losses(first)) == list(losses(second)) == list(range(1, STEPS + 1))
    assert losses(first) == losses(second)
    assert not list(tmp_path.glob("slurm-*.run")), "a finished run leaves nothing of the script's behind"


def test_what_fails_or_does_not_move_on_is_not_started_again(
    cluster: Cluster, words: list[str], tmp_path: Path
) -> None:
    faulty = submit(cluster, tmp_path, [*words, "args.train_itres=3"], tasks=2)
    stuck = submit(cluster, tmp_path, [*words, "args.train_iters=2000"])
    cancelled = submit(cluster, tmp_path, [*words, "args.train_iters=2000", "args.experiment_name=cancelled"])

    assert faulty.wait() == "FAILED"
    assert cluster.exit_code(faulty.number) == 2
    assert faulty.output.count("did you mean 'train_iters'") == 1, faulty.output
    assert "the run ended with exit code 2; not starting again" in faulty.output

    stuck.wait_for_steps(2)
    (tmp_path / f"slurm-{stuck.number}.step").write_text("2000\n")  # as if it had saved its last step already
    cluster.send("scancel", "--batch", "--signal=USR1", stuck.number)
    assert stuck.wait() == "FAILED"
    assert "no progress; not starting again" in stuck.output
    assert (stuck.run_directory / "PREEMPTED").exists()

    cancelled.wait_for_steps(2)
    cluster.send("scancel", cancelled.number)
    assert cancelled.wait() == "CANCELLED"
    cluster.wait_for(lambda: (cancelled.run_directory / "PREEMPTED").exists())
    assert [cluster.starts(job.number) for job in (faulty, stuck, cancelled)] == [0, 0, 0]


def test_a_fault_on_one_task_alone_is_shown_and_ends_all_tasks(
    cluster: Cluster, words: list[str], tmp_path: Path
) -> None:
    """As when one machine has not mounted the disk with the data; here SLURM ends no task for another."""
    (tmp_path / "disk0").symlink_to(DEMO)
    line = """exec sat-train train "$@" "args.train_data=[disk$SLURM_PROCID]" """
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nsrun --kill-on-bad-exit=0 bash -c '{line}' sh \"$@\"\n")
    number = cluster.submit(script, ["--ntasks-per-node=2"], words, cwd=tmp_path)
    job = Job(cluster, number, tmp_path)
    assert job.wait() == "FAILED"
    assert cluster.exit_code(number) == 2
    assert job.output.count("disk1") == 1, job.output
    assert "rank 1: 1 fault in the configuration" in job.output

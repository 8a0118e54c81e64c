"""Laws of the loop: what it reports, when it saves, what a failed save does."""

from pathlib import Path

import pytest

from sat_train.distributed.processes import ProcessGrid
from sat_train.errors import CheckpointError
from sat_train.training.callbacks.callback import Callback
from sat_train.training.callbacks.checkpoint import Checkpointer, PreemptedMarker
from sat_train.training.callbacks.metrics_file import MetricsFile, read_metrics
from sat_train.training.callbacks.tensorboard import TensorBoard
from sat_train.training.meter import Meter
from sat_train.training.run_folder import PREEMPTED
from sat_train.training.schedule import LearningRate
from sat_train.training.state import TrainState
from sat_train.training.trainer import Trainer
from tests.ranks.toy import build_toy, toy_run

pytestmark = pytest.mark.ranks

RATE = LearningRate(peak=1e-2, warmup_steps=3, style="linear", decay_end=10, floor_ratio=0.0)
BATCH = 2


class StopAt(Callback):
    """Asks one rank to stop after a step."""

    def __init__(self, grid: ProcessGrid, stop_request, step: int) -> None:
        self._asked = grid.rank == grid.world_size - 1
        self._stop_request, self._step = stop_request, step

    def step_done(self, trainer) -> None:
        if self._asked and trainer.state.step == self._step:
            self._stop_request.signal_name = "SIGTERM"


def _train(
    grid: ProcessGrid,
    folder: Path,
    *,
    steps: int = 10,
    log_interval: int = 1,
    failing: tuple[int, ...] = (),
    stop_at: int = -1,
) -> tuple[list[int], str]:
    """Trains the toy; returns the steps whose save was asked for, and the error that ended the run."""
    _, stepper, stop_request = build_toy(grid, toy_run(batch_size=BATCH))
    asked = []

    def save(trainer: Trainer) -> Path:
        asked.append(trainer.state.step)
        if trainer.state.step in failing:
            raise CheckpointError(f"no room at step {trainer.state.step}")
        return folder

    checkpointer = Checkpointer(grid, folder, save, interval=2, keep_last=0, keep_every=0)
    reports = [MetricsFile(folder), TensorBoard(folder), PreemptedMarker(folder)] if grid.rank == 0 else []
    trainer = Trainer(
        stepper=stepper,
        meter=Meter(grid),
        learning_rate=RATE,
        train_iters=steps,
        log_interval=log_interval,
        state=TrainState(),
        callbacks=[*reports, checkpointer, StopAt(grid, stop_request, stop_at)],
    )
    try:
        trainer.run()
    except CheckpointError as error:
        return asked, str(error)
    assert trainer.state.samples_consumed == trainer.state.step * BATCH * grid.data_size
    return asked, ""


def _run(grid: ProcessGrid, folder: Path, options: dict) -> tuple[list[int], str]:
    return _train(grid, folder, **options)


def test_every_entry_has_the_rate_of_its_step_and_all_that_people_ask_for(rank_pool, tmp_path):
    rank_pool(2)(_run, tmp_path, {})
    entries = read_metrics(tmp_path / "metrics.jsonl")
    assert [entry["step"] for entry in entries] == list(range(1, 11))
    assert [entry["lr"] for entry in entries] == [RATE.at(step) for step in range(10)]
    for entry in entries:
        assert entry["loss"] > 0
        assert entry["grad_norm"] > 0
        assert entry["samples_per_s"] > 0
        assert 0 <= entry["data_wait_s"] <= entry["step_time_s"]
        assert entry["peak_memory_gib"] > 0.01
        assert entry["skipped"] == 0
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_how_often_a_run_is_logged_changes_neither_its_losses_nor_their_smoothing(rank_pool, tmp_path):
    found = {}
    for interval in (1, 4):
        folder = tmp_path / str(interval)
        folder.mkdir()
        rank_pool(1)(_run, folder, {"log_interval": interval})
        found[interval] = {entry["step"]: entry for entry in read_metrics(folder / "metrics.jsonl")}
    assert sorted(found[4]) == [1, 4, 8, 10]
    for step, entry in found[4].items():
        assert entry["loss"] == found[1][step]["loss"]
        assert entry["loss_smoothed"] == found[1][step]["loss_smoothed"]


def test_the_smoothed_loss_is_a_mean_of_all_losses_from_the_first_step_on():
    state = TrainState()
    for _ in range(3):
        state.take_loss(4.0)
    assert state.loss_smoothed == pytest.approx(4.0)
    state.take_loss(0.0)
    assert 2.9 < state.loss_smoothed < 4.0


@pytest.mark.parametrize(
    ("options", "asked", "error"),
    [
        ({}, [2, 4, 6, 8, 10], ""),
        ({"steps": 7}, [2, 4, 6, 7], ""),
        ({"failing": (4, 6)}, [2, 4, 6, 8, 10], ""),
        ({"failing": (2, 4, 6)}, [2, 4, 6], "no room at step 6"),
        ({"failing": (10,)}, [2, 4, 6, 8, 10], "no room at step 10"),
        ({"stop_at": 4}, [2, 4, 5], ""),
    ],
)
def test_saves_come_at_intervals_and_once_at_the_end_and_some_may_fail(
    rank_pool, tmp_path, options, asked, error
):
    assert rank_pool(2)(_run, tmp_path, options) == [(asked, error)] * 2
    stopped = "stop_at" in options
    assert (tmp_path / PREEMPTED).exists() == stopped
    if stopped:
        assert (tmp_path / PREEMPTED).read_text() == "5\n"

"""Laws of the loop: what it reports, when it saves, what a failed save does."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sat_train.checkpoint.layout import PREEMPTED
from sat_train.config.learning_rate import LearningRate
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError, TrainingError
from sat_train.objective.training_inputs import LossOutput
from sat_train.training.callbacks.checkpoint import Checkpointer, PreemptedMarker
from sat_train.training.callbacks.loss_by_timestep import LossByTimestep
from sat_train.training.callbacks.metrics_file import MetricsFile, read_metrics
from sat_train.training.callbacks.tensorboard import TensorBoard
from sat_train.training.callbacks.validation import Validation
from sat_train.training.callbacks.validation_videos import SampleVideos
from sat_train.training.callbacks.videos_to_sample import VideoToSample
from sat_train.training.loop.callback import Callback
from sat_train.training.loop.clip_losses import ClipLosses
from sat_train.training.loop.meter import Meter
from sat_train.training.loop.metrics import ValidationMetrics
from sat_train.training.loop.state import TrainState
from sat_train.training.loop.step import TrainStep
from sat_train.training.loop.trainer import Trainer
from tests.ranks.toy import build_toy, toy_batches, toy_model, toy_run

pytestmark = pytest.mark.ranks

RATE = LearningRate(peak=1e-2, warmup_steps=3, style="linear", decay_end=10, floor_ratio=0.0)
BATCH = 2


class StopAt(Callback):
    """Asks one rank to stop after a step."""

    def __init__(self, mesh: ProcessMesh, stop_request, step: int) -> None:
        self._asked = mesh.rank == mesh.world_size - 1
        self._stop_request, self._step = stop_request, step

    def step_done(self, trainer) -> None:
        if self._asked and trainer.state.step == self._step:
            self._stop_request.signal_name = "SIGTERM"


def _by_timestep(mesh: ProcessMesh) -> list[dict[str, float]]:
    """Two intervals of random losses; each rank has its own."""
    callback = LossByTimestep(mesh, num_timesteps=1000, parts=8)
    measured = []
    for interval in range(2):
        for timesteps, losses in _losses(mesh.rank, interval):
            callback.loss_computed(LossOutput(losses.mean(), losses, timesteps), None)
        measured.append(callback.measure(None))
    return measured


def _losses(rank: int, interval: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(10 * rank + interval)
    batches = []
    for _ in range(5):
        timesteps = torch.randint(0, 700, (3,), generator=generator)
        batches.append((timesteps, torch.rand(3, generator=generator)))
    return batches


def test_the_loss_by_timestep_is_the_mean_over_all_ranks_and_steps_since_the_last_report(rank_pool):
    for measured in rank_pool(2)(_by_timestep):
        for interval, values in enumerate(measured):
            expected: dict[str, list[float]] = {}
            for rank in range(2):
                for timesteps, losses in _losses(rank, interval):
                    for timestep, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
                        expected.setdefault(f"loss_t{timestep // 125 * 125}", []).append(loss)
            means = {name: sum(each) / len(each) for name, each in expected.items()}
            assert values == pytest.approx(means, rel=1e-6)
            assert "loss_t875" not in values, "no sample was there"


def _trainer(
    mesh: ProcessMesh,
    train_step: TrainStep,
    *,
    train_iters: int,
    callbacks: list[Callback],
    step: int = 0,
    log_interval: int = 1,
) -> Trainer:
    return Trainer(
        train_step=train_step,
        meter=Meter(mesh),
        learning_rate=RATE,
        train_iters=train_iters,
        log_interval=log_interval,
        state=TrainState(step=step),
        callbacks=callbacks,
    )


def _train(
    mesh: ProcessMesh,
    folder: Path,
    *,
    steps: int = 10,
    log_interval: int = 1,
    failing: tuple[int, ...] = (),
    stop_at: int = -1,
    poison: int = -1,
    in_background: bool = False,
    writes_long: bool = False,
    more: tuple[Callback, ...] = (),
) -> tuple[list[int], str]:
    """Trains the toy; returns the steps that were to be committed, and the error that ended the run."""
    _, train_step, stop_request = build_toy(
        mesh, toy_run(batch_size=BATCH), poison=poison, is_saving=writes_long and mesh.rank == 1
    )
    longest = 2 if writes_long else 1  # steps that a save in the background may take
    asked, committed = [], []

    def save(trainer: Trainer, *, in_background: bool) -> Callable[[], Path]:
        assert asked == committed, "the last one is committed first"
        step = trainer.state.step
        asked.append(step)

        def commit() -> Path:
            committed.append(step)
            late = trainer.state.step - step
            assert late == min(longest, steps - step) if in_background and stop_at < 0 else late <= longest
            if step in failing:
                raise CheckpointError(f"no room at step {step}")
            return folder

        return commit

    checkpointer = Checkpointer(
        mesh, folder, save, interval=2, keep_last=0, keep_every=0, in_background=in_background
    )
    reports = [MetricsFile(folder), TensorBoard(folder), PreemptedMarker(folder)] if mesh.rank == 0 else []
    trainer = _trainer(
        mesh,
        train_step,
        train_iters=steps,
        log_interval=log_interval,
        callbacks=[*more, *reports, checkpointer, StopAt(mesh, stop_request, stop_at)],
    )
    try:
        trainer.run()
    except (CheckpointError, TrainingError) as error:
        return committed, str(error)
    assert trainer.state.samples_consumed == trainer.state.step * BATCH * mesh.data_size
    return committed, ""


def _run(mesh: ProcessMesh, folder: Path, options: dict) -> tuple[list[int], str]:
    return _train(mesh, folder, **options)


def test_every_entry_has_the_rate_of_its_step_and_all_that_people_ask_for(rank_pool, tmp_path):
    rank_pool(2)(_run, tmp_path, {})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["lr"] for record in records] == [RATE.at(step) for step in range(10)]
    for record in records:
        assert record["loss"] > 0
        assert record["grad_norm"] > 0
        assert record["samples_per_s"] > 0
        assert 0 <= record["data_wait_s"] <= record["step_time_s"]
        assert record["peak_memory_gib"] > 0.01
        assert record["skipped"] == 0
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_how_often_a_run_is_logged_changes_neither_its_losses_nor_their_smoothing(rank_pool, tmp_path):
    values = {}
    for interval in (1, 4):
        folder = tmp_path / str(interval)
        folder.mkdir()
        rank_pool(1)(_run, folder, {"log_interval": interval})
        values[interval] = {record["step"]: record for record in read_metrics(folder / "metrics.jsonl")}
    assert sorted(values[4]) == [1, 4, 8, 10]
    for step, record in values[4].items():
        assert record["loss"] == values[1][step]["loss"]
        assert record["loss_smoothed"] == values[1][step]["loss_smoothed"]


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
        ({"writes_long": True}, [2, 4, 6, 8, 10], ""),
        ({"poison": 17}, [2, 4], "step 5: the loss is not finite"),
    ],
)
def test_saves_come_at_intervals_and_once_at_the_end_and_some_may_fail(
    rank_pool, tmp_path, options, asked, error
):
    for in_background in (False, True):
        folder = tmp_path / str(in_background)
        folder.mkdir()
        results = rank_pool(2)(_run, folder, {**options, "in_background": in_background})
        assert [(steps, text[: len(error)]) for steps, text in results] == [(asked, error)] * 2
        stopped = "stop_at" in options
        assert (folder / PREEMPTED).exists() == stopped
        if stopped:
            assert (folder / PREEMPTED).read_text() == "5\n"


class Failing(Callback):
    """A reporter that fails in one method, each time."""

    optional = True

    def __init__(self, method: str) -> None:
        def fail(*_: object) -> None:
            raise AttributeError(f"broken {method}")

        setattr(self, method, fail)


def _train_with_failing_reporters(mesh: ProcessMesh, folder: Path) -> tuple[list[int], str]:
    methods = ("started", "step_done", "reported", "finished", "closed")
    return _train(mesh, folder, more=tuple(map(Failing, methods)) if mesh.rank == 1 else ())


def test_a_run_whose_reporters_fail_everywhere_on_one_rank_is_the_run_without_them(rank_pool, tmp_path):
    losses = []
    for name, function, args in (("plain", _run, ({},)), ("failing", _train_with_failing_reporters, ())):
        (tmp_path / name).mkdir()
        assert rank_pool(2)(function, tmp_path / name, *args) == [([2, 4, 6, 8, 10], "")] * 2
        losses.append([record["loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == losses[1]


class InterruptedValidation(Validation):
    """A validation in the middle of which a person presses Ctrl-C, at one step."""

    def __init__(self, engine, stop_request, folder: Path, *, at: int, measured: list[int]) -> None:
        def measure(step, asked_to_stop, *, with_report):
            measured.append(self._step)
            if self._step == at:
                stop_request.signal_name = "SIGINT"
            assert with_report
            losses = ClipLosses((500,), {"a": (0.5,)})
            return None if asked_to_stop() else ValidationMetrics(step, losses)

        records = read_metrics(folder / "metrics.jsonl")
        known = {record["step"] for record in records if "valid_loss" in record}
        super().__init__(engine, measure, interval=3, is_measured=known.__contains__)

    def _validate(self, trainer) -> None:
        self._step = trainer.state.step
        super()._validate(trainer)


def _interrupted(
    mesh: ProcessMesh, folder: Path, step: int, at: int
) -> tuple[list[int], list[int], int, bool]:
    """Trains from a step until Ctrl-C; returns the steps saved and validated, and how the run ended."""
    engine, train_step, stop_request = build_toy(mesh, toy_run(batch_size=BATCH))
    saved: list[int] = []
    measured: list[int] = []

    def save(trainer: Trainer, *, in_background: bool) -> Callable[[], Path]:
        saved.append(trainer.state.step)
        return lambda: folder

    trainer = _trainer(
        mesh,
        train_step,
        train_iters=8,
        step=step,
        callbacks=[
            MetricsFile(folder),
            Checkpointer(mesh, folder, save, interval=4, keep_last=0, keep_every=0),
            InterruptedValidation(engine, stop_request, folder, at=at, measured=measured),
        ],
    )
    trainer.run()
    return saved, measured, trainer.state.step, trainer.interrupted


def test_ctrl_c_in_a_validation_saves_that_step_and_what_is_owed_is_measured_after_the_resume(
    rank_pool, tmp_path
):
    pool = rank_pool(1)
    assert pool(_interrupted, tmp_path, 0, 3) == [([3], [0, 3], 3, True)]
    assert pool(_interrupted, tmp_path, 3, 8) == [([4, 8], [3, 6, 8], 8, True)], "the last one too"
    assert pool(_interrupted, tmp_path, 8, -1) == [([], [8], 8, False)]
    assert pool(_interrupted, tmp_path, 8, -1) == [([], [], 8, False)]
    measured = [
        record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if "valid_loss" in record
    ]
    assert measured == [0, 3, 6, 8]


def test_ctrl_c_before_the_first_step_saves_nothing(rank_pool, tmp_path):
    assert rank_pool(1)(_interrupted, tmp_path, 0, 0) == [([], [0], 0, True)]


def _sampled(
    mesh: ProcessMesh, folder: Path, step: int, ctrl_c_in: int, failing: int
) -> tuple[list[int], bool]:
    """Trains one step, or resumes at it; returns the videos made and whether the run was interrupted."""
    engine, train_step, stop_request = build_toy(mesh, toy_run(batch_size=BATCH))
    made: list[int] = []

    def generate(number: int) -> torch.Tensor:
        made.append(number)
        if number == ctrl_c_in:
            stop_request.signal_name = "SIGINT"
        if number == failing:
            raise KeyError(f"no video {number}")
        return torch.full((5, 3, 16, 16), 40 * number, dtype=torch.uint8)

    videos = SampleVideos(
        mesh,
        engine,
        folder,
        videos=[VideoToSample(prompt) for prompt in "abcd"],
        generate=generate,
        fps=8,
        interval=1,
        lockstep=False,
    )
    trainer = _trainer(
        mesh,
        train_step,
        train_iters=1,
        step=step,
        callbacks=[videos],
    )
    trainer.run()
    return made, trainer.interrupted


def test_sampling_stops_between_two_videos_and_what_is_owed_is_made_after_the_resume(rank_pool, tmp_path):
    pool = rank_pool(2)
    assert pool(_sampled, tmp_path, 0, 1, -1) == [([0], True), ([1], True)], (
        "asked on one rank, heeded on both"
    )
    assert sorted(path.name for path in (tmp_path / "samples/000001").iterdir()) == ["00.mp4", "01.mp4"]
    assert pool(_sampled, tmp_path, 1, -1, -1) == [([0, 2], False), ([1, 3], False)]
    assert (tmp_path / "samples/000001/contact_sheet.png").exists()
    assert pool(_sampled, tmp_path, 1, -1, -1) == [([], False), ([], False)]


def test_a_video_that_fails_on_one_rank_costs_no_other_video_and_no_run(rank_pool, tmp_path):
    pool = rank_pool(2)
    assert pool(_sampled, tmp_path, 0, -1, 1) == [([0, 2], False), ([1, 3], False)]
    names = sorted(path.name for path in (tmp_path / "samples/000001").iterdir())
    assert names == ["00.mp4", "02.mp4", "03.mp4"], "and no contact sheet: the videos are still owed"


class GradientSum(Callback):
    """Notes the gradients before each update."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def before_optimizer_step(self, trainer) -> None:
        self.seen.append({name: gradient.clone() for name, gradient in trainer.engine.gradients()})


def _gradients(mesh: ProcessMesh, zero_stage: int) -> list[dict[str, torch.Tensor]]:
    config = toy_run(batch_size=BATCH, accumulation=2, zero_stage=zero_stage, clip_grad=0.0)
    _, train_step, _ = build_toy(mesh, config)
    callback = GradientSum()
    trainer = _trainer(
        mesh,
        train_step,
        train_iters=2,
        callbacks=[callback],
    )
    trainer.run()
    return callback.seen


def _plain_gradients(ranks: int) -> dict[str, torch.Tensor]:
    """Gradients of the first step by autograd alone: all samples in one batch."""
    model = toy_model()
    whole = SimpleNamespace(data_rank=0, data_size=1)
    batch = next(toy_batches(whole, BATCH * 2 * ranks))
    (model(batch.inputs) - batch.targets).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_before_the_update_each_rank_can_read_the_whole_averaged_gradient(rank_pool, zero_stage):
    expected = _plain_gradients(2)
    for seen in rank_pool(2)(_gradients, zero_stage):
        assert len(seen) == 2
        assert seen[0].keys() == expected.keys(), "all that trains, and nothing frozen"
        for name, gradient in seen[0].items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
        assert any(not torch.equal(seen[0][name], seen[1][name]) for name in expected)

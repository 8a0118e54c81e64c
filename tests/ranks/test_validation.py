"""Validation: the same clips, noise and timesteps everywhere, and no trace in the training."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from sat_train.checkpoint.layout import committed_steps
from sat_train.distributed.processes import ProcessMesh, stop_processes
from sat_train.interchange.sources import find_weights
from sat_train.training.callbacks.validation_file import read_validations
from sat_train.training.resume import find_resumed
from tests.ranks.micro import micro_run, train_micro, write_micro

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("validation")
    write_micro(path)
    stop_processes()
    return path


def run_directory(folder: Path, name: str) -> Path:
    (found,) = (folder / "runs").glob(f"{name}-*")
    return found


def train(rank_pool, folder: Path, name: str, *words: str, ranks: int = 1, batch_size: int = 2) -> Path:
    """Trains the micro model and returns its run directory."""
    shape = [f"args.experiment_name={name}", f"args.batch_size={batch_size}", "args.lr=1e-3", "args.warmup=0"]
    rank_pool(ranks)(train_micro, folder, [*shape, "args.lr_decay_style=constant", *words])
    return run_directory(folder, name)


VALIDATED = ("args.eval_interval=2", "args.eval_batch_size=1", "args.eval_iters=5", "args.eval_timesteps=3")


def test_any_number_of_ranks_validates_the_same_clips_at_the_same_noise(rank_pool, folder):
    words = ("args.train_iters=2", *VALIDATED)
    one = train(rank_pool, folder, "one", *words, batch_size=4)
    two = train(rank_pool, folder, "two", *words, "args.seed=99", ranks=2, batch_size=2)
    losses = [read_validations(run) for run in (one, two)]
    assert losses[0].keys() == losses[1].keys() == {0, 2}
    assert len(losses[0][0]) == 5
    assert losses[0][0].timesteps == (166, 500, 833)
    assert losses[0][0] == losses[1][0], "the same weights: bit for bit, at another seed too"
    assert losses[0][0].mean() == losses[1][0].mean()
    assert losses[0][2].clips.keys() == losses[1][2].clips.keys()
    assert len({loss for row in losses[0][0].clips.values() for loss in row}) == 15


# A rate at which the loss falls at first and rises later.
RISING = ("args.lr=0.03", "args.save_interval=2", "args.keep_last=1", *VALIDATED)


def means(run: Path) -> dict[int, float]:
    return {step: losses.mean().mean for step, losses in read_validations(run).items()}


def log_of(mesh: ProcessMesh, folder: Path, words: list[str]) -> str:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("sat_train")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train_micro(mesh, folder, words)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def rising(rank_pool, folder) -> Path:
    return train(rank_pool, folder, "rising", "args.train_iters=10", *RISING, ranks=2)


def test_the_best_checkpoint_is_kept_and_can_be_named(rising, folder):
    losses = means(rising)
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert 2 < best < 8, "neither the newest nor the one before it, or nothing is shown"
    assert (rising / "best").read_text() == str(best)
    assert committed_steps(rising) == [10, best]
    assert find_weights(rising / "best").path == rising / str(best)
    assert find_resumed(micro_run(folder, f"args.resume={rising}/best")).step == best


def test_a_run_that_goes_back_forgets_the_best_of_what_it_left(rank_pool, folder):
    run = train(rank_pool, folder, "back", "args.train_iters=8", *RISING, "args.keep_every=2")
    assert int((run / "best").read_text()) > 2
    words = (*RISING, "args.keep_every=2", "args.train_iters=4", "args.lr=0", f"args.resume={run}/2")
    train(rank_pool, folder, "back", *words)
    assert means(run).keys() == {0, 2, 4}
    assert (run / "best").read_text() == "2", "at a rate of 0 step 4 is as good, and later"


@pytest.mark.parametrize("ranks", [1, 2])
def test_early_stop_ends_a_run_on_all_ranks_at_a_saved_step_and_a_resume_explains(
    rank_pool, rising, folder, ranks
):
    losses = means(rising)
    second = int((rising / "best").read_text()) + 4  # the second validation that is not lower
    name = f"early{ranks}"
    words = ("args.train_iters=14", *RISING, "args.save_interval=4", "args.early_stop_patience=2")
    run = train(rank_pool, folder, name, *words, ranks=ranks, batch_size=4 // ranks)
    assert means(run).keys() == {step for step in losses if step <= second}
    assert committed_steps(run)[0] == second, "which is no multiple of save_interval"
    assert not (run / "PREEMPTED").exists()
    resumed = [f"args.experiment_name={name}", *words, "args.resume=must", "args.batch_size=4"]
    (log,) = rank_pool(1)(log_of, folder, resumed)
    assert re.search(rf"finished already: step {second} of 14 by early stop: 2 validations in a row", log)
    assert committed_steps(run)[0] == second
    longer = [*resumed, "args.early_stop_patience=5", f"args.train_iters={second + 1}"]
    rank_pool(1)(train_micro, folder, longer)
    assert committed_steps(run)[0] == second + 1

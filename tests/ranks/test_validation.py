"""Validation: the same clips, noise and timesteps everywhere, and no trace in the training."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat_train.distributed.processes import stop_processes
from sat_train.training.callbacks.validation_file import read_validations
from tests.ranks.micro import train_micro, write_micro

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

"""Validation: the same clips, noise and timesteps everywhere, and no trace in the training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from sat_train.checkpoint.layout import committed_steps
from sat_train.distributed.processes import ProcessMesh, stop_processes
from sat_train.interchange.sources import find_weights
from sat_train.training.callbacks.clip_ledger import read_ledger, render_table, summarize_clips
from sat_train.training.callbacks.metrics_file import read_metrics
from sat_train.training.callbacks.validation_file import read_validations
from sat_train.training.resume import find_resumed
from tests.ranks.micro import logged_micro, micro_run, run_directory, train_micro, write_micro

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("validation")
    write_micro(path)
    stop_processes()
    return path


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


def test_early_stop_ends_a_run_on_all_ranks_at_a_saved_step_and_a_resume_explains(rank_pool, rising, folder):
    losses = means(rising)
    second = int((rising / "best").read_text()) + 4  # the second validation that is not lower
    words = ("args.train_iters=14", *RISING, "args.save_interval=4", "args.early_stop_patience=2")
    run = train(rank_pool, folder, "early", *words, ranks=2)
    assert means(run).keys() == {step for step in losses if step <= second}
    assert committed_steps(run)[0] == second, "which is no multiple of save_interval"
    assert not (run / "PREEMPTED").exists()
    resumed = ["args.experiment_name=early", *words, "args.resume=must", "args.batch_size=4"]
    (lines,) = rank_pool(1)(logged_micro, folder, resumed)
    ending = rf"finished already: step {second} of 14 by early stop: 2 validations in a row"
    assert re.search(ending, "\n".join(lines))
    assert committed_steps(run)[0] == second
    longer = [*resumed, "args.early_stop_patience=5", f"args.train_iters={second + 1}"]
    rank_pool(1)(train_micro, folder, longer)
    assert committed_steps(run)[0] == second + 1


ALL_ON = (
    *VALIDATED,
    "args.eval_interval=4",
    "args.keep_best=true",
    "args.clip_ledger=true",
    "args.early_stop_patience=50",
    "args.callbacks.blocks={target: BlockStatistics, params: {interval: 3}}",
)
CONSTANT_RATE = ("args.warmup=0", "args.lr=1e-3", "args.lr_decay_style=constant")
ALL_OFF = ("args.clip_ledger=false", "args.keep_best=false", "args.eval_interval=null")


def leaves_of(value: object) -> Iterator[object]:
    """Yields names and tensors of a saved state, in their order."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves_of(item)
    else:
        yield value


def states(mesh: ProcessMesh, folder: Path, words: list[str]) -> bytes:
    """Trains and returns the state of torch's generator afterwards."""
    train_micro(mesh, folder, words)
    return bytes(torch.get_rng_state().tolist())


@pytest.fixture(scope="module")
def with_and_without(rank_pool, folder) -> dict[tuple[str, int], list[bytes]]:
    """Random states after runs of 12 steps: with all that watches the training, and without."""
    found = {}
    for ranks in (1, 2):
        for name, words in (("with", ALL_ON), ("without", ALL_OFF)):
            run_words = [f"args.experiment_name={name}{ranks}", "args.train_iters=12", "args.save_interval=4"]
            run_words += [*CONSTANT_RATE, f"args.batch_size={4 // ranks}", *words]
            found[name, ranks] = rank_pool(ranks)(states, folder, run_words)
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_knowing_whether_it_learns_changes_no_bit_of_what_is_learnt(with_and_without, folder, ranks):
    runs = [run_directory(folder, f"{name}{ranks}") for name in ("with", "without")]
    first, second = (
        [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record] for run in runs
    )
    assert len(first) == 12
    assert first == second
    assert with_and_without["with", ranks] == with_and_without["without", ranks]
    saved, plain = (
        [leaf for path in sorted((run / "12").glob("*.pt")) for leaf in leaves_of(torch.load(path))]
        for run in runs
    )
    assert len(saved) == len(plain) > 50
    assert all(
        torch.equal(*pair) if isinstance(pair[0], torch.Tensor) else pair[0] == pair[1]
        for pair in zip(saved, plain, strict=True)
    )
    run = runs[0]
    reported = [record for record in read_metrics(run / "metrics.jsonl") if "update_ratio_by_block" in record]
    assert [record["step"] for record in reported] == [3, 6, 9, 12]
    assert "block_00" in reported[0]["grad_norm_by_block"]
    assert means(run).keys() == {0, 4, 8, 12}


def test_the_ledger_has_every_sample_once_at_any_number_of_ranks_and_after_a_resume(
    rank_pool, with_and_without, folder
):
    whole = {ranks: read_ledger(run_directory(folder, f"with{ranks}")) for ranks in (1, 2)}
    assert [row[0] for row in whole[1]] == list(range(12 * 4))
    assert [row[:3] for row in whole[2]] == [row[:3] for row in whole[1]]
    words = ["args.experiment_name=ledger", "args.save_interval=4", *CONSTANT_RATE]
    words += ["args.batch_size=2", *ALL_ON, "args.keep_every=4"]
    rank_pool(2)(train_micro, folder, [*words, "args.train_iters=6"])
    run = run_directory(folder, "ledger")
    back = [f"args.resume={run}/4", "args.train_iters=12"]
    rank_pool(2)(train_micro, folder, [*words, *back])
    assert read_ledger(run) == whole[2], "bit for bit; rows of the steps 5 and 6 are there once"
    assert (run / "clip_losses.csv").read_text() == render_table(summarize_clips(whole[2]))

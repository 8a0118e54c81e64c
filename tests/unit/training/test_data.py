"""What a run trains on when it resumes a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat_train.checkpoint.find import ResumePoint
from sat_train.checkpoint.manifest import Manifest
from sat_train.distributed.processes import start_single_process
from sat_train.training.run_data import open_data
from tests.ranks.encoded_runs import load_run, make_set


def point(fingerprint: str, consumed: int, waiting: tuple[int, ...] = ()) -> ResumePoint:
    manifest = Manifest(
        step=3,
        samples_consumed=consumed,
        samples_waiting=waiting,
        world_size=1,
        data_size=1,
        model_size=1,
        dtype="fp32",
        trainable_only=False,
        config_digest="",
        data_fingerprint=fingerprint,
        base_weights=None,
        versions={},
        files=(),
    )
    return ResumePoint(run_directory=Path("run"), step=3, manifest=manifest, steps=(3,))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory):
    folder = make_set(tmp_path_factory.mktemp("data") / "set", "abc")
    words = [f"args.train_data=[{folder}]", "args.valid_data=null", "args.eval_interval=null"]
    buckets = "data.params.buckets={sizes: [[64,64]]}"
    return load_run([*words, "args.valid_video_interval=null", buckets, "args.batch_size=2"])


def test_a_run_resumes_with_the_next_sample_and_the_waiting_ones(config, caplog) -> None:
    mesh = start_single_process()
    new = open_data(config, mesh)
    taken = [next(new.train).sample_indices for _ in range(8)]
    stopped = open_data(config, mesh)
    steps = 0
    while not stopped.train.position.waiting:
        next(stopped.train)
        steps += 1
    position = stopped.train.position
    caplog.clear()
    saved = point(new.train.fingerprint, position.consumed, position.waiting)
    resumed = open_data(config, mesh, point=saved)
    assert [next(resumed.train).sample_indices for _ in range(8 - steps)] == taken[steps:]
    assert "differ from those of the checkpoint" not in caplog.text


def test_a_run_that_resumes_on_other_data_says_so(config, caplog) -> None:
    open_data(config, start_single_process(), point=point("another", 6))
    assert "the training data differ from those of the checkpoint (fingerprint " in caplog.text
    assert "was another): the run continues at sample 6 of the new order" in caplog.text


def test_the_epochs_that_are_left_are_counted_from_the_samples_consumed(tmp_path: Path) -> None:
    """Two epochs of three clips, four samples consumed, in whatever batches."""
    folder = make_set(tmp_path / "set", "abc")
    fixed = [f"args.train_data=[{folder}]", "args.valid_data=null", "args.eval_interval=null"]
    fixed += ["args.valid_video_interval=null", "args.train_iters=null", "args.epochs=2"]
    for batch_size, accumulation, total in ((1, 1, 5), (2, 1, 4), (4, 1, 4), (1, 2, 4)):
        words = [f"args.batch_size={batch_size}", f"args.gradient_accumulation_steps={accumulation}"]
        config = load_run([*fixed, *words])
        assert open_data(config, start_single_process(), point=point("", 4)).train_iters == total
        assert open_data(config, start_single_process()).train_iters == -(-6 // (batch_size * accumulation))

"""Whole runs over clips of many shapes: resume, world size, nothing lost on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat_train.distributed.processes import stop_processes
from sat_train.training.callbacks.metrics_file import read_metrics
from tests.ranks.micro import TIMES, run_directory, train_micro, write_micro
from tests.unit.data.videos import make_folder

pytestmark = pytest.mark.ranks

SHAPE = ["args.warmup=2", "args.lr_decay_iters=10", "args.lr_decay_style=cosine", "args.save_interval=2"]
BUCKETS = "data.params.buckets={sizes: [[32,64],[64,32]], frames: [1]}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("micro")
    write_micro(path)
    stop_processes()
    make_folder(path / "set", "abc", num_frames=40)
    make_folder(path / "set", "defgh", num_frames=40, width=64)
    make_folder(path / "set", "ijk", num_frames=40, height=64)
    make_folder(path / "set", "lmn", num_frames=6)
    (path / "set" / "videos" / "n.mp4").write_bytes(b"x" * 99)
    return path


def _words(folder: Path, name: str, steps: int, *words: str) -> list[str]:
    fixed = [f"args.experiment_name={name}", f"args.train_iters={steps}", f"args.train_data=[{folder}/set]"]
    return [
        *SHAPE,
        *fixed,
        "args.valid_data=null",
        BUCKETS,
        "data.max_bad_fraction=0.2",
        "args.gradient_accumulation_steps=2",
        *words,
    ]


def _records(folder: Path, name: str) -> list[dict]:
    path = run_directory(folder, name)
    records = read_metrics(path / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_equals_one_that_never_stopped_bit_for_bit(rank_pool, folder, world_size):
    pool, names = rank_pool(world_size), [f"{kind}{world_size}" for kind in ("straight", "resumed")]
    pool(train_micro, folder, _words(folder, names[0], 6))
    pool(train_micro, folder, _words(folder, names[1], 3))
    pool(train_micro, folder, _words(folder, names[1], 6, "args.resume=must"))
    straight, resumed = (_records(folder, name) for name in names)
    assert [record["step"] for record in resumed] == list(range(1, 7))
    assert resumed == straight


def test_a_run_may_resume_with_another_number_of_ranks(rank_pool, folder):
    """Two ranks of two samples or one of four: the same batches, whoever has done the steps before."""
    rank_pool(2)(train_micro, folder, _words(folder, "two", 6))
    rank_pool(2)(train_micro, folder, _words(folder, "mixed", 3))
    rank_pool(1)(train_micro, folder, _words(folder, "mixed", 6, "args.batch_size=4", "args.resume=must"))
    two, mixed = _records(folder, "two"), _records(folder, "mixed")
    assert [record["step"] for record in mixed] == list(range(1, 7))
    for one, other in zip(two, mixed, strict=True):
        # sums of the same fp32 numbers in another order, amplified by Adam over six steps
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_validation_and_batches_by_tokens_run_too(rank_pool, folder):
    words = ["args.split=3,1,0", "args.eval_interval=2", "args.eval_iters=4", "args.epochs=2"]
    words += ["args.train_iters=null", "data.params.buckets.max_tokens=120"]
    rank_pool(2)(train_micro, folder, _words(folder, "tokens", 4, *words))
    records = _records(folder, "tokens")
    seen = [record for record in records if "valid_loss" in record]
    assert len({record["valid_samples"] for record in seen}) == 1
    assert all(record["loss"] > 0 for record in records if "loss" in record)

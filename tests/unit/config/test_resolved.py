"""`resolved.yaml` says everything, and loads back to the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sat_train.config import load_run_config
from sat_train.config.paths import ASSETS
from sat_train.config.resolved import render_resolved, write_resolved
from tests.unit.config.cogvideo_files import MEMBERS, model_file, sft_file
from tests.unit.config.conftest import Load

Write = Callable[[str, str], str]


def test_round_trip(load: Load, tmp_path: Path) -> None:
    config = load("args: {valid_prompts: ['a: \"b\" # c', 'ä']}", "--lr", "3e-7", "args.experiment_name=0123")
    write_resolved(config, tmp_path / "resolved.yaml")
    again = load_run_config([tmp_path / "resolved.yaml"], check_paths=False)
    assert (again.args, again.model, again.data, again.deepspeed) == (
        config.args,
        config.model,
        config.data,
        config.deepspeed,
    )
    assert again.digest() == config.digest()


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_round_trip_of_older_files(member: object, write: Write, tmp_path: Path) -> None:
    files = [write("model.yaml", json.dumps(model_file(member))), write("sft.yaml", json.dumps(sft_file()))]
    config = load_run_config(files, purpose="check", check_paths=False)
    write_resolved(config, tmp_path / "resolved.yaml")
    again = load_run_config([tmp_path / "resolved.yaml"], purpose="check", check_paths=False)
    assert again.tree() == config.tree()
    assert not [note for note in again.notes if note.startswith("Keys of older files")]


def test_each_value_has_its_source(load: Load) -> None:
    text = render_resolved(load("", "--seed", "9"))
    lines = {line.split(":")[0].strip(): line for line in text.splitlines()}
    assert lines["seed"].endswith("# command line")
    assert lines["gradient_clipping"].endswith("# configs/sft.yaml")
    assert lines["hidden_size"].endswith("# configs/model/cogvideox_tiny.yaml")
    assert lines["prefetch_factor"].endswith("# default")


def test_nothing_of_this_machine_is_written(load: Load) -> None:
    assert str(ASSETS) not in render_resolved(load())
    assert "asset:demo/train" in render_resolved(load())


def test_words_win_over_a_resolved_file(load: Load, tmp_path: Path) -> None:
    write_resolved(load(), tmp_path / "resolved.yaml")
    words = ["deepspeed.optimizer.params.lr=0.5", "args.batch_size=9"]
    again = load_run_config([tmp_path / "resolved.yaml"], words, check_paths=False)
    assert (again.args.lr, again.deepspeed.train_micro_batch_size_per_gpu) == (0.5, 9)


def test_digest_knows_what_changes_the_numbers(load: Load) -> None:
    digest = load().digest()
    assert load("", "args.log_interval=1", "args.save=elsewhere", "args.num_workers=0").digest() == digest
    assert load("", "args.seed=1").digest() != digest
    assert load("", "model.scale_factor=2.0").digest() != digest

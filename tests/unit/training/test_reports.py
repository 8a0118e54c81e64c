"""What is written down of a run, for people and for programs."""

import json
from types import SimpleNamespace

import pytest

from sat_train.errors import LaunchError
from sat_train.training.callbacks.metrics_file import MetricsFile, read_metrics
from sat_train.training.callbacks.progress import describe
from sat_train.training.callbacks.wandb import WeightsAndBiases
from sat_train.training.entries import TrainEntry, ValidationEntry, scalars


def _entry(step: int, **changes) -> TrainEntry:
    values = {
        "loss": 0.5,
        "loss_smoothed": 0.25,
        "lr": 1e-5,
        "grad_norm": 0.1,
        "step_time_s": 2.0,
        "data_wait_s": 0.0,
        "samples_per_s": 4.0,
        "peak_memory_gib": 1.5,
        "skipped": 0,
    }
    return TrainEntry(step=step, **{**values, **changes})


VALIDATION = ValidationEntry(step=2, valid_loss=0.75, valid_loss_by_timestep={62: 1.0}, valid_samples=8)


def _at(step: int) -> SimpleNamespace:
    return SimpleNamespace(state=SimpleNamespace(step=step))


def test_a_line_names_everything_and_the_time_left():
    line = describe(_entry(10, skipped=2, bad_clips=3), 40)
    parts = ("step 10/40", "loss 0.50000", "smoothed 0.25000", "lr 1e-05", "grad 0.1", "skipped 2")
    for part in (*parts, "bad clips 3"):
        assert part in line
    assert line.endswith("left 0:01:00")
    assert not {"skipped", "bad"} & set(describe(_entry(10), 40).split())
    assert "grad" not in describe(_entry(10, grad_norm=None), 40)
    assert describe(VALIDATION, 40) == "step 2: validation loss 0.75000 on 8 clips"


def test_every_line_of_the_file_is_json_even_when_a_number_is_not_finite(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.started(_at(0))
    metrics.reported(_entry(1, grad_norm=float("inf")))
    metrics.reported(VALIDATION)
    first, second = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert first["grad_norm"] is None
    assert first["loss"] == 0.5
    assert second == {
        "step": 2,
        "valid_loss": 0.75,
        "valid_loss_by_timestep": {"62": 1.0},
        "valid_samples": 8,
    }


def test_a_run_that_goes_on_drops_what_it_will_do_again(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.started(_at(0))
    for step in (1, 2, 3):
        metrics.reported(_entry(step))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # torn by a kill
    MetricsFile(tmp_path).started(_at(2))
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_trackers_get_numbers_only():
    assert scalars(_entry(3, grad_norm=None)).keys() == {
        f"train/{name}"
        for name in (
            "loss",
            "loss_smoothed",
            "lr",
            "step_time_s",
            "data_wait_s",
            "samples_per_s",
            "peak_memory_gib",
            "skipped",
            "bad_clips",
        )
    }
    assert scalars(VALIDATION) == {"valid/loss": 0.75, "valid/loss_at_62": 1.0}


def test_wandb_without_its_package_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LaunchError, match=r"args\.wandb = true, but the package wandb is not installed"):
        WeightsAndBiases(tmp_path, project="p", config={})

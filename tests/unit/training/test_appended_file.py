"""A disk that is full for a while costs no line of a report, and leaves none that is torn."""

import json
import os
import resource
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from sat_train.training.callbacks.appended_file import AppendedFile
from sat_train.training.callbacks.metrics_file import MetricsFile, read_metrics
from sat_train.training.callbacks.tensorboard import TensorBoard
from sat_train.training.loop.clip_losses import ClipLosses
from sat_train.training.loop.metrics import ValidationMetrics


@contextmanager
def room_for(num_bytes: int):
    """Lets no file of this process grow beyond a size: writes end as on a full disk, in mid-record."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_records_that_found_no_room_follow_whole_and_in_order(tmp_path):
    file = AppendedFile(tmp_path / "log")
    file.append(b"first\n")
    with room_for(9):
        for record in (b"second\n", b"third\n"):
            with pytest.raises(OSError, match="File too large"):
                file.append(record)
            assert (tmp_path / "log").read_bytes() == b"first\n", "no torn record"
    file.append(b"fourth\n")
    assert (tmp_path / "log").read_bytes() == b"first\nsecond\nthird\nfourth\n"


def _metrics(step: int) -> ValidationMetrics:
    return ValidationMetrics(step, ClipLosses((62, 500), {"a": (0.5, 0.5), "b": (float("nan"), 0.5)}))


def _at(step: int) -> SimpleNamespace:
    return SimpleNamespace(state=SimpleNamespace(step=step))


def test_a_full_disk_costs_no_metrics_not_even_at_the_start_of_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "valid_loss": 0.1}) + "\n" for step in (1, 2, 3)))
    metrics = MetricsFile(tmp_path)
    with room_for(10):
        for call, argument in (
            (metrics.started, _at(2)),
            (metrics.reported, _metrics(3)),
            (metrics.reported, _metrics(4)),
        ):
            with pytest.raises(OSError, match="File too large"):
                call(argument)
    metrics.reported(_metrics(5))
    assert [(record["step"], record["valid_loss"]) for record in read_metrics(path)] == [
        (1, 0.1),
        (2, 0.1),
        (3, None),
        (4, None),
        (5, None),
    ]
    assert "NaN" not in path.read_text(), "JSON has no NaN"
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_a_full_disk_costs_no_event(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    with room_for(10):
        for call, argument in ((board.started, _at(0)), (board.reported, _metrics(1))):
            with pytest.raises(OSError, match="File too large"):
                call(argument)
    board.reported(_metrics(2))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("valid/loss")] == [1, 2]

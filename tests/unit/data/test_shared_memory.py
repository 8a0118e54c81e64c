"""Too little shared memory is named before workers die of it, and when they do."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from sat_train.config.shapes import ClipShape
from sat_train.data import shared_memory
from sat_train.data.batches import OrderedBatches
from sat_train.data.failure_log import FailureLog
from sat_train.data.loader import VideoLoader
from sat_train.data.shared_memory import bytes_in_flight, warn_of_little_shared_memory
from sat_train.errors import DataError
from tests.unit.data.test_loader import make_dataset
from tests.unit.data.videos import make_folder, record_of

DOCKER = 64 * 1024**2


def test_what_is_in_flight_is_the_largest_batch_as_often_as_workers_prepare_it():
    shapes = [ClipShape(49, 480, 720), ClipShape(1, 480, 720)]
    one = 2 * 3 * 49 * 480 * 720
    assert one == pytest.approx(102e6, rel=0.01)
    assert bytes_in_flight(shapes, [2, 8], num_workers=1, prefetch_factor=4) == 5 * one
    assert bytes_in_flight(shapes, [2, 8], num_workers=0, prefetch_factor=4) == 0


def test_a_container_with_64_mb_is_warned_for_a_real_model_and_not_for_the_tiny_one(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(DOCKER, 0, DOCKER))
    tiny = bytes_in_flight([ClipShape(17, 64, 96)], [4], num_workers=2, prefetch_factor=4)
    warn_of_little_shared_memory(tiny, local_ranks=2)
    assert caplog.text == ""
    real = bytes_in_flight([ClipShape(49, 480, 720)], [2], num_workers=1, prefetch_factor=4)
    warn_of_little_shared_memory(real, local_ranks=8)
    for words in (
        "/dev/shm has 67 MB free",
        "of 8 ranks",
        "4.1 GB",
        "--shm-size",
        "--ipc=host",
        "num_workers",
    ):
        assert words in caplog.text


def test_where_there_is_no_shared_memory_nothing_is_said(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path / "nothing")
    warn_of_little_shared_memory(1 << 60, local_ranks=1)
    assert caplog.text == ""


def test_a_worker_that_dies_of_a_bus_error_names_shared_memory(tmp_path):
    root = make_folder(tmp_path / "set", ["a"], num_frames=30)
    dataset = make_dataset([record_of(root / "videos" / "a.mp4")])
    dataset.read = lambda *_, **__: os.kill(os.getpid(), signal.SIGBUS)
    failures = FailureLog(num_clips=1, max_bad_fraction=1)
    loader = VideoLoader(dataset=dataset, batches=OrderedBatches([1]), failures=failures, num_workers=1)
    with pytest.raises(DataError, match=r"bus error: shared memory ran out \(/dev/shm has[\s\S]*--shm-size"):
        next(loader)

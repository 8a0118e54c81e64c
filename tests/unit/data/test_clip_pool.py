"""Clips are looked into by processes; one that crashes or hangs names its clip, and the others continue."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from sat_train.data.clip_pool import look_into_clips
from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.sources.records import ClipRecord
from sat_train.errors import DataError

pytestmark = pytest.mark.timeout(300, method="thread")


@pytest.fixture
def left_over():
    """Returns what gives the processes of this test that still run; living ranks belong to others."""
    others = set(multiprocessing.active_children())
    return lambda: set(multiprocessing.active_children()) - others


def clips(count):
    return [ClipRecord(f"{i:02d}", Path(f"/{i:02d}.mp4"), ("x",)) for i in range(count)]


@pytest.mark.parametrize("num_processes", [1, 3, 50])
def test_results_come_in_order_and_each_is_reported(left_over, num_processes):
    seen = []
    result = look_into_clips(
        clips(20),
        lambda record: (record.clip_id, os.getpid()),
        num_processes=num_processes,
        on_clip=lambda: seen.append(1),
    )
    assert [clip_id for clip_id, _ in result] == [record.clip_id for record in clips(20)]
    assert os.getpid() not in {pid for _, pid in result}
    assert len({pid for _, pid in result}) <= num_processes
    assert len(seen) == 20
    assert not left_over()


def test_no_clips_take_no_process():
    assert look_into_clips([], lambda record: None, num_processes=4) == []


@pytest.mark.parametrize("num_processes", [1, 3])
def test_clips_that_crash_or_hang_are_named_and_the_others_are_read(left_over, num_processes):
    def look(record):
        if record.clip_id in ("03", "11"):
            os.kill(os.getpid(), signal.SIGKILL)
        if record.clip_id == "05":
            time.sleep(1000)
        if record.clip_id == "07":
            raise BadClip("damaged", "of its own accord")
        return record.clip_id

    result = look_into_clips(clips(12), look, num_processes=num_processes, timeout_s=2)
    causes = {i: reason.cause for i, reason in enumerate(result) if isinstance(reason, BadClip)}
    assert causes == {3: "worker died", 5: "timeout", 7: "damaged", 11: "worker died"}
    assert [name for name in result if isinstance(name, str)] == [
        "00",
        "01",
        "02",
        "04",
        "06",
        "08",
        "09",
        "10",
    ]
    assert not left_over()


def test_other_errors_end_it_in_their_own_words(left_over):
    def look(record):
        raise DataError(f"{record.clip_id} is not what it should be")

    with pytest.raises(DataError, match="00 is not what it should be"):
        look_into_clips(clips(3), look, num_processes=1)
    assert not left_over()


def test_processes_leave_with_their_parent():
    """Killed outright, it takes them with it."""
    pids = multiprocessing.get_context("fork").SimpleQueue()

    def look(record):
        pids.put(os.getpid())
        time.sleep(1000)

    parent = multiprocessing.get_context("fork").Process(
        target=look_into_clips, args=(clips(2), look), kwargs={"num_processes": 2}
    )
    parent.start()
    workers = [pids.get(), pids.get()]
    parent.kill()
    parent.join()
    for pid in workers:
        while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
            time.sleep(0.02)

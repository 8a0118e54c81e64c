"""A run folder has one name and one living owner."""

import re
import subprocess
import sys
import time

import pytest

from sat_train.distributed.processes import start_single_process
from sat_train.errors import SatTrainError
from sat_train.training.run_folder import LOCK, RunLock, is_alive, open_run_folder

HOLD = """
import sys, time
from pathlib import Path
from sat_train.training.run_folder import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def grid():
    return start_single_process()


def _open(grid, save_root, resumed=lambda: None):
    return open_run_folder(grid, save_root=save_root, experiment_name="demo", resumed=resumed)


def test_a_new_folder_carries_name_and_time_and_no_two_are_the_same(grid, tmp_path):
    opened = [_open(grid, tmp_path / "runs") for _ in range(2)]
    assert len({folder for folder, _ in opened}) == 2
    for folder, lock in opened:
        assert re.fullmatch(r"demo-\d{8}-\d{6}", folder.name)
        lock.release()


def test_a_living_run_of_another_process_is_seen_and_its_death_too(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    assert is_alive(tmp_path)
    with pytest.raises(BlockingIOError):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK).exists()
    assert not is_alive(tmp_path)


def test_a_run_that_ended_in_order_leaves_no_lock(tmp_path):
    lock = RunLock(tmp_path)
    assert is_alive(tmp_path)
    lock.release()
    assert not is_alive(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_machine_s_run_is_alive_as_long_as_its_heart_beats(tmp_path, monkeypatch):
    path = tmp_path / LOCK
    path.write_text("elsewhere 1 7\n")
    assert not is_alive(tmp_path, watch_s=0.01)
    monkeypatch.setattr(time, "sleep", lambda _: path.write_text("elsewhere 1 8\n"))
    assert is_alive(tmp_path, watch_s=0.01)


def test_when_another_run_was_faster_the_next_answer_counts(grid, tmp_path):
    taken, free = tmp_path / "taken", tmp_path / "free"
    taken.mkdir()
    free.mkdir()
    holder = RunLock(taken)
    answers = iter([taken, free])
    folder, lock = _open(grid, tmp_path, lambda: next(answers))
    assert folder == free
    lock.release()
    holder.release()


def test_a_folder_that_cannot_be_made_is_a_clear_error(grid, tmp_path):
    blocker = tmp_path / "runs"
    blocker.write_text("a file")
    with pytest.raises(SatTrainError, match=r"args\.save = .*runs: (File exists|Not a directory)"):
        _open(grid, blocker)

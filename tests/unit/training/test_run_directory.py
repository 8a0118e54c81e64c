"""A run directory has one name and one living owner."""

import errno
import fcntl
import os
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from sat_train.distributed.processes import start_single_process
from sat_train.errors import LaunchError, SatTrainError
from sat_train.training import run_lock
from sat_train.training.run_directory import check_own_entries, claim_run_directory
from sat_train.training.run_lock import LOCK, RunLock, is_alive

HOLD = """
import sys, time
from pathlib import Path
from sat_train.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def mesh():
    return start_single_process()


def _open(mesh, save_root, resumed=lambda: None):
    return claim_run_directory(mesh, save_root=save_root, experiment_name="demo", resumed=resumed)


def test_a_new_folder_carries_name_and_time_and_no_two_are_the_same(mesh, tmp_path):
    opened = [_open(mesh, tmp_path / "runs") for _ in range(2)]
    assert len({folder for folder, _ in opened}) == 2
    for folder, lock in opened:
        assert re.fullmatch(r"demo-\d{8}-\d{6}", folder.name)
        lock.release()


def test_a_run_of_another_process_is_noticed_and_so_is_its_end(tmp_path):
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


def test_a_lock_that_cannot_be_removed_hides_no_failure_and_is_taken_over(tmp_path, monkeypatch, caplog):
    lock = RunLock(tmp_path)

    def read_only(path: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as disk:
        disk.setattr(os, "unlink", read_only)
        lock.release()
    assert "run.lock stays: Read-only file system" in caplog.text
    assert not is_alive(tmp_path)
    RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_another_machine_s_run_is_alive_as_long_as_its_heart_beats(tmp_path, monkeypatch):
    path = tmp_path / LOCK
    path.write_text("elsewhere 1 7\n")
    assert not is_alive(tmp_path, watch_s=0.01)
    monkeypatch.setattr(time, "sleep", lambda _: path.write_text("elsewhere 1 8\n"))
    assert is_alive(tmp_path, watch_s=0.01)


def test_when_another_run_was_faster_the_next_answer_counts(mesh, tmp_path):
    taken, free = tmp_path / "taken", tmp_path / "free"
    taken.mkdir()
    free.mkdir()
    holder = RunLock(taken)
    answers = iter([taken, free])
    folder, lock = _open(mesh, tmp_path, lambda: next(answers))
    assert folder == free
    lock.release()
    holder.release()


def test_a_folder_that_cannot_be_made_is_a_clear_error(mesh, tmp_path):
    blocker = tmp_path / "runs"
    blocker.write_text("a file")
    with pytest.raises(SatTrainError, match=r"args\.save = .*runs: (File exists|Not a directory)"):
        _open(mesh, blocker)


# --- where there are no file locks


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def no_file_locks(request, monkeypatch):
    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_without_file_locks_the_heartbeat_keeps_a_second_run_out_on_the_same_machine_too(
    tmp_path, no_file_locks, monkeypatch
):
    monkeypatch.setattr(run_lock, "_HEARTBEAT_S", 0.01)
    lock = RunLock(tmp_path, watch_s=0.2)
    assert is_alive(tmp_path, watch_s=0.2)
    with pytest.raises(BlockingIOError):
        RunLock(tmp_path, watch_s=0.2)
    lock.release()
    assert not is_alive(tmp_path, watch_s=0.2)
    RunLock(tmp_path, watch_s=0.2).release()
    assert list(tmp_path.iterdir()) == []


def test_without_file_locks_what_a_killed_run_left_does_not_block(tmp_path, no_file_locks):
    (tmp_path / LOCK).write_text(f"{socket.gethostname()} 1 abc 000000000007\n")
    assert not is_alive(tmp_path, watch_s=0.05)
    RunLock(tmp_path, watch_s=0.05).release()


def test_without_file_locks_one_of_many_that_begin_together_gets_the_folder(tmp_path, no_file_locks):
    got, missed = [], []

    def begin():
        try:
            got.append(RunLock(tmp_path, watch_s=2))
        except BlockingIOError:
            missed.append(1)

    threads = [threading.Thread(target=begin) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(missed)) == (1, 4)
    got[0].release()


def test_a_lock_on_a_file_that_was_released_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch):
    """Opened before, locked after the release of another run: that lock is on a deleted file."""
    first = RunLock(tmp_path)
    flock, calls = fcntl.flock, []

    def release_first(descriptor, kind):
        if not calls:
            calls.append(kind)
            first.release()
        return flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", release_first)
    second = RunLock(tmp_path)
    assert (tmp_path / LOCK).exists()
    with pytest.raises(BlockingIOError):
        RunLock(tmp_path)
    second.release()


def test_a_run_whose_folder_was_taken_over_writes_no_more(tmp_path):
    lock = RunLock(tmp_path)
    lock.check_held()
    (tmp_path / "new").write_text("another run")
    (tmp_path / "new").rename(tmp_path / LOCK)
    with pytest.raises(LaunchError, match="belongs to another run by now"):
        lock.check_held()
    lock.release()
    assert (tmp_path / LOCK).read_text() == "another run"


# --- a folder that comes from a stranger


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling", "fifo", "folder", "socket"])
def test_a_lock_that_is_no_ordinary_file_is_refused_at_once_and_untouched(tmp_path, kind):
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    run.mkdir()
    lock = run / LOCK
    if kind == "link":
        lock.symlink_to(victim)
    elif kind == "hard link":
        lock.hardlink_to(victim)
    elif kind == "dangling":
        lock.symlink_to(tmp_path / "not there")
    elif kind == "fifo":
        os.mkfifo(lock)
    elif kind == "folder":
        lock.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(lock))
    for action in (is_alive, RunLock):
        with pytest.raises(LaunchError, match=r"run\.lock is a link, a folder, a device or a pipe"):
            action(run)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "not there").exists()


OWN_ENTRIES = [
    *("run.lock", "resolved.yaml", "model_config.json", "latest", "metrics.jsonl", "quarantine.jsonl"),
    *(
        "PREEMPTED",
        "wandb_id",
        "tensorboard",
        "samples",
        "samples/000004",
        "7",
        "7/manifest.json",
        ".tmp-8-ab",
    ),
    *("latest.part", "latest.0123abcd.part", "wandb"),
]


@pytest.mark.parametrize("name", OWN_ENTRIES)
def test_a_folder_with_a_link_out_of_it_is_refused_by_name_and_nothing_outside_is_touched(
    mesh, tmp_path, name
):
    outside, run = tmp_path / "outside", tmp_path / "demo-20260101-000000"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(outside if "." not in name else outside / "file")
    with pytest.raises(LaunchError, match=re.escape(f"{run / name} is a link")):
        _open(mesh, tmp_path, lambda: run)
    assert [path.read_text() for path in outside.iterdir()] == ["precious"]


def test_links_that_stay_inside_the_folder_are_left_alone(tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run-1").mkdir()
    (tmp_path / "wandb" / "latest-run").symlink_to("run-1")
    check_own_entries(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples/1/00.mp4", "1/manifest.json", "quarantine.jsonl"])
def test_a_pipe_in_a_run_directory_is_named_instead_of_waited_for(mesh, tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(LaunchError, match=re.escape(f"{tmp_path / name} is a pipe, socket or device")):
        _open(mesh, tmp_path, lambda: tmp_path)
    assert not list(tmp_path.glob("run.lock*"))

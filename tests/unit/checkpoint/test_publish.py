from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sat_train.checkpoint.find import newest_verified
from sat_train.checkpoint.layout import LATEST, MANIFEST, committed_steps
from sat_train.checkpoint.manifest import verify_checkpoint
from sat_train.checkpoint.retention import prune_checkpoints, remove_leftovers
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from tests.unit.checkpoint.folders import FILES, commit, holds_step, run_directory, states_of_kills


def test_a_published_folder_holds_the_files_and_their_hashes(mesh: ProcessMesh, tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    target = commit(mesh, run, 7)
    assert target == run / "7"
    assert sorted(path.name for path in target.iterdir()) == sorted([*FILES, MANIFEST])
    assert (run / LATEST).read_text() == "7"
    assert verify_checkpoint(target).samples_consumed == 28
    assert not list(run.glob(".tmp-*"))


def test_a_step_that_is_saved_again_replaces_the_old_one(mesh: ProcessMesh, tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    commit(mesh, run, 7)
    (run / "7" / "stray").touch()
    commit(mesh, run, 7)
    assert not (run / "7" / "stray").exists()
    assert holds_step(run / "7", 7)
    assert not list(run.glob(".tmp-*"))


# --- killed at every point


def test_a_save_killed_at_any_point_never_leaves_a_torn_checkpoint(mesh: ProcessMesh, tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    commit(mesh, run, 1)

    def save_and_prune() -> None:
        commit(mesh, run, 2)
        prune_checkpoints(run, keep_last=1)

    states = states_of_kills(save_and_prune, run, tmp_path)
    seen = set()
    for number, state in enumerate(states):
        newest = newest_verified(state)
        assert newest is not None, f"nothing to resume from after a kill at operation {number}"
        assert holds_step(state / str(newest.step), newest.step)
        assert not list(state.glob("*.corrupt")), f"a torn folder was committed at operation {number}"
        seen.add(newest.step)

        remove_leftovers(state)
        assert not list(state.glob(".tmp-*"))
        commit(mesh, state, 3)
        assert (state / LATEST).read_text() == "3"
    assert seen == {1, 2}
    assert len(states) > 20


# --- a disk that is full


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(mount)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_fills_during_a_save_keeps_the_earlier_checkpoint(
    mesh: ProcessMesh, tiny_disk: Path
) -> None:
    run = run_directory(tiny_disk)
    commit(mesh, run, 1)
    (tiny_disk / "other").write_bytes(b"x" * 50_000)
    with pytest.raises(
        CheckpointError, match=r"(?s)step 2 could not be written.*rank 0: .*No space left on device"
    ):
        commit(mesh, run, 2)
    newest = newest_verified(run)
    assert newest is not None
    assert newest.step == 1
    assert not list(run.glob(".tmp-*"))
    (tiny_disk / "other").unlink()
    commit(mesh, run, 2)
    assert committed_steps(run) == [2, 1]


def test_too_little_space_is_said_before_anything_is_written(mesh: ProcessMesh, tiny_disk: Path) -> None:
    run = run_directory(tiny_disk)
    with pytest.raises(
        CheckpointError, match=r"(?s)no room for the checkpoint of step 1 .*expected: 120 MiB"
    ):
        commit(mesh, run, 1, expected_bytes=100 * 2**20)
    assert not list(run.iterdir())


def test_a_write_that_fails_half_way_is_reported_with_its_cause(mesh: ProcessMesh, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stops a file where a quota would, without needing root."""
    run = run_directory(tmp_path)
    commit(mesh, run, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match=os.strerror(errno.EFBIG)):
            commit(mesh, run, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert committed_steps(run) == [1]
    assert not list(run.glob(".tmp-*"))


def test_a_run_directory_that_is_gone_is_one_clear_error(mesh: ProcessMesh, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: No such file or directory"):
        commit(mesh, tmp_path / "nowhere", 1)

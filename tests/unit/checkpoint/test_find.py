from __future__ import annotations

import json
from pathlib import Path

import pytest

from sat_train.checkpoint.find import ResumePoint, find_resume_point, newest_verified
from sat_train.checkpoint.layout import MANIFEST, committed_steps
from sat_train.checkpoint.manifest import read_manifest, verify_checkpoint
from sat_train.checkpoint.retention import prune_checkpoints, remove_leftovers
from sat_train.distributed.processes import ProcessGrid
from sat_train.errors import CheckpointError
from tests.unit.checkpoint.folders import FILES, commit, run_folder


def find(root: Path, mode: str = "auto", *, alive: tuple[Path, ...] = ()) -> ResumePoint | None:
    return find_resume_point(
        mode, save_root=root, experiment_name="exp", is_alive=lambda folder: folder in alive
    )


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_damage_is_found_and_named(grid: ProcessGrid, tmp_path: Path, name: str) -> None:
    run = run_folder(tmp_path)

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    damages = {"contents changed": flip_one_bit, "bytes": truncate, "missing": Path.unlink}
    for step, (message, damage) in enumerate(damages.items()):
        folder = commit(grid, run, step)
        damage(folder / name)
        with pytest.raises(CheckpointError, match=rf"(?s){folder} is damaged.*{name}: .*{message}"):
            verify_checkpoint(folder)


def test_a_manifest_that_was_edited_is_refused(grid: ProcessGrid, tmp_path: Path) -> None:
    folder = commit(grid, run_folder(tmp_path), 5)
    path = folder / MANIFEST
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, "samples_consumed": body["samples_consumed"] + 1}))
    with pytest.raises(CheckpointError, match="damaged: its own SHA-256"):
        read_manifest(folder)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"not a complete checkpoint: it has no manifest\.json"):
        read_manifest(folder)


def test_a_damaged_step_is_set_aside_and_the_one_before_it_taken(grid: ProcessGrid, tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    for step in (10, 20, 30):
        commit(grid, run, step)
    flip_one_bit(run / "30" / FILES[0])
    (run / "20" / FILES[1]).unlink()
    found = find(tmp_path)
    assert found is not None
    assert found.step == 10
    assert sorted(path.name for path in run.glob("*.corrupt")) == ["20.corrupt", "30.corrupt"]
    commit(grid, run, 30)
    flip_one_bit(run / "30" / FILES[0])
    again = newest_verified(run)
    assert again is not None
    assert again.step == 10
    assert (run / "30.corrupt.1").is_dir()


def test_auto_takes_the_newest_stopped_run_of_that_name(grid: ProcessGrid, tmp_path: Path) -> None:
    assert find(tmp_path) is None
    old = run_folder(tmp_path, "20260101-000000")
    new = run_folder(tmp_path, "20260102-000000")
    empty = run_folder(tmp_path, "20260103-000000")
    other = run_folder(tmp_path, "20260104-000000", name="exp-large")
    commit(grid, old, 900)
    commit(grid, new, 100)
    commit(grid, other, 500)
    (empty / "7").mkdir()

    found = find(tmp_path)
    assert found is not None
    assert (found.run_folder, found.step) == (new, 100)
    found = find(tmp_path, alive=(new,))
    assert found is not None
    assert found.run_folder == old


def test_must_fails_when_there_is_nothing_and_none_looks_at_nothing(
    grid: ProcessGrid, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"resume = must: .* no complete checkpoint of a stopped 'exp'"):
        find(tmp_path, "must")
    commit(grid, run_folder(tmp_path), 1)
    assert find(tmp_path, "must") is not None
    assert find(tmp_path, "none") is None


def test_a_path_names_a_run_or_one_step_of_it(grid: ProcessGrid, tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    for step in (10, 20):
        commit(grid, run, step)
    found = find(tmp_path, str(run))
    assert found is not None
    assert found.step == 20
    found = find(tmp_path, str(run / "10"))
    assert found is not None
    assert (found.run_folder, found.step) == (run, 10)

    flip_one_bit(run / "10" / FILES[0])
    with pytest.raises(CheckpointError, match="10 is damaged"):
        find(tmp_path, str(run / "10"))
    assert (run / "10").is_dir(), "a step that a person named is theirs to judge"
    with pytest.raises(CheckpointError, match="no such folder"):
        find(tmp_path, str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="a living run writes to"):
        find(tmp_path, str(run), alive=(run,))
    with pytest.raises(CheckpointError, match="no complete checkpoint inside"):
        find(tmp_path, str(run_folder(tmp_path, "20260109-000000")))


def test_retention_keeps_the_newest_and_the_milestones(grid: ProcessGrid, tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    for step in range(10, 110, 10):
        commit(grid, run, step)
    assert prune_checkpoints(run, keep_last=0) == []
    assert prune_checkpoints(run, keep_last=2, keep_every=40) == [70, 60, 50, 30, 20, 10]
    assert committed_steps(run) == [100, 90, 80, 40]
    assert not list(run.glob(".tmp-*"))


def test_leftovers_are_removed_and_nothing_else(grid: ProcessGrid, tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    commit(grid, run, 1)
    (run / ".tmp-2-abc").mkdir()
    (run / ".tmp-2-abc" / FILES[0]).touch()
    (run / "samples").mkdir()
    assert [path.name for path in remove_leftovers(run)] == [".tmp-2-abc"]
    assert (run / "samples").is_dir()
    assert committed_steps(run) == [1]

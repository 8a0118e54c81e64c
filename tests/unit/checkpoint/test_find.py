from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sat_train.checkpoint.find import ResumePoint, find_resume_point, newest_verified
from sat_train.checkpoint.history import rewind
from sat_train.checkpoint.layout import MANIFEST, committed_steps
from sat_train.checkpoint.manifest import read_manifest, verify_checkpoint
from sat_train.checkpoint.retention import prune_checkpoints, remove_leftovers
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.interchange.adapters import read_given_lora
from sat_train.interchange.conversion import Conversion, open_source
from sat_train.interchange.locate import read_transformer_weights
from tests.unit.checkpoint.folders import FILES, commit, run_directory, signed, unsigned


def find(root: Path, mode: str = "auto", *, alive: tuple[Path, ...] = ()) -> ResumePoint | None:
    return find_resume_point(
        mode, save_root=root, experiment_name="exp", is_alive=lambda folder: folder in alive
    )


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_damage_is_found_and_named(mesh: ProcessMesh, tmp_path: Path, name: str) -> None:
    run = run_directory(tmp_path)

    def truncate(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1])

    damages = {"contents changed": flip_one_bit, "bytes": truncate, "missing": Path.unlink}
    for step, (message, damage) in enumerate(damages.items()):
        folder = commit(mesh, run, step)
        damage(folder / name)
        with pytest.raises(CheckpointError, match=rf"(?s){folder} is damaged.*{name}: .*{message}"):
            verify_checkpoint(folder)


def test_a_manifest_that_was_edited_is_refused(mesh: ProcessMesh, tmp_path: Path) -> None:
    folder = commit(mesh, run_directory(tmp_path), 5)
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


def test_a_damaged_step_is_set_aside_and_the_one_before_it_taken(mesh: ProcessMesh, tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    for step in (10, 20, 30):
        commit(mesh, run, step)
    flip_one_bit(run / "30" / FILES[0])
    (run / "20" / FILES[1]).unlink()
    newest = find(tmp_path)
    assert newest is not None
    assert newest.step == 10
    assert sorted(path.name for path in run.glob("*.corrupt")) == ["20.corrupt", "30.corrupt"]
    commit(mesh, run, 30)
    flip_one_bit(run / "30" / FILES[0])
    again = newest_verified(run)
    assert again is not None
    assert again.step == 10
    assert (run / "30.corrupt.1").is_dir()


def test_auto_takes_the_newest_stopped_run_of_that_name(mesh: ProcessMesh, tmp_path: Path) -> None:
    assert find(tmp_path) is None
    old = run_directory(tmp_path, "20260101-000000")
    new = run_directory(tmp_path, "20260102-000000")
    empty = run_directory(tmp_path, "20260103-000000")
    other = run_directory(tmp_path, "20260104-000000", name="exp-large")
    commit(mesh, old, 900)
    commit(mesh, new, 100)
    commit(mesh, other, 500)
    (empty / "7").mkdir()

    point = find(tmp_path)
    assert point is not None
    assert (point.run_directory, point.step) == (new, 100)
    point = find(tmp_path, alive=(new,))
    assert point is not None
    assert point.run_directory == old


def test_must_fails_when_there_is_nothing_and_none_looks_at_nothing(
    mesh: ProcessMesh, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"resume = must: .* no complete checkpoint of a stopped 'exp'"):
        find(tmp_path, "must")
    commit(mesh, run_directory(tmp_path), 1)
    assert find(tmp_path, "must") is not None
    assert find(tmp_path, "none") is None


def test_a_path_names_a_run_or_one_step_of_it(mesh: ProcessMesh, tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    for step in (10, 20):
        commit(mesh, run, step)
    point = find(tmp_path, str(run))
    assert point is not None
    assert point.step == 20
    point = find(tmp_path, str(run / "10"))
    assert point is not None
    assert (point.run_directory, point.step) == (run, 10)

    flip_one_bit(run / "10" / FILES[0])
    with pytest.raises(CheckpointError, match="10 is damaged"):
        find(tmp_path, str(run / "10"))
    assert (run / "10").is_dir(), "a step that a person named is theirs to judge"
    with pytest.raises(CheckpointError, match="no such folder"):
        find(tmp_path, str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="another process is writing to"):
        find(tmp_path, str(run), alive=(run,))
    with pytest.raises(CheckpointError, match="no complete checkpoint inside"):
        find(tmp_path, str(run_directory(tmp_path, "20260109-000000")))


ENTRANCES: dict[str, Callable[[Path], object]] = {
    "resume": lambda step: find(step.parent.parent, str(step)),
    "args.load, sampling": read_transformer_weights,
    "args.load of a run": lambda step: read_transformer_weights(step.parent),
    "args.load_lora": read_given_lora,
    "convert": lambda step: open_source(Conversion(step, step / "out", to="sat")),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_flipped_bit_is_named_at_every_entrance(
    mesh: ProcessMesh, tmp_path: Path, name: str, entrance: str
) -> None:
    folder = commit(mesh, run_directory(tmp_path), 7)
    flip_one_bit(folder / name)
    with pytest.raises(CheckpointError, match=rf"(?s)7 is damaged.*{name}: contents changed"):
        ENTRANCES[entrance](folder)


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_file_that_nobody_committed_is_not_taken_for_a_part(
    mesh: ProcessMesh, tmp_path: Path, entrance: str
) -> None:
    folder = commit(mesh, run_directory(tmp_path), 7)
    (folder / "mp_rank_01_model_states.pt").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"mp_rank_01_model_states\.pt does not belong to the checkpoint"
    ):
        ENTRANCES[entrance](folder)


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_step_without_its_manifest_never_passes_for_a_folder_of_sat(
    mesh: ProcessMesh, tmp_path: Path, entrance: str
) -> None:
    folder = commit(mesh, run_directory(tmp_path), 7)
    (folder.parent / "resolved.yaml").touch()
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no manifest|no complete checkpoint"):
        ENTRANCES[entrance](folder)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOMEM])
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("call", ["open", "stat"])
def test_what_cannot_be_read_is_not_called_damaged(
    mesh: ProcessMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, name: str, number: int
) -> None:
    run = run_directory(tmp_path)
    for step in (10, 20):
        commit(mesh, run, step)
    original = getattr(os, call)

    def fails(path: Any, *args: Any, **options: Any) -> Any:
        if str(path) == str(run / "20" / name):
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(os, call, fails)
    for mode in ("auto", "must", str(run), str(run / "20")):
        with pytest.raises(CheckpointError, match=f"20/{name} cannot be read: {os.strerror(number)}"):
            find(tmp_path, mode)
    monkeypatch.undo()
    assert committed_steps(run) == [20, 10]
    point = find(tmp_path)
    assert point is not None
    assert point.step == 20


def test_the_manifest_of_a_newer_version_is_not_called_damaged(mesh: ProcessMesh, tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    commit(mesh, run, 10)
    path = commit(mesh, run, 20) / MANIFEST
    for change in ({"format": 1}, {"format": 3}, {"new_field": 1}):
        path.write_text(signed({**unsigned(path), **change}))
        with pytest.raises(CheckpointError, match=r"20/manifest\.json is not understood: "):
            find(tmp_path)
    assert committed_steps(run) == [20, 10]


def test_a_step_set_aside_is_refused_with_the_way_back(mesh: ProcessMesh, tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    for step in (10, 20):
        commit(mesh, run, step)
    rewind(run, 10)
    with pytest.raises(
        CheckpointError, match=r"20\.abandoned: this step has been set aside(.|\n)*rename it to 20"
    ):
        find(tmp_path, str(run / "20.abandoned"))


def test_retention_keeps_the_newest_and_the_milestones(mesh: ProcessMesh, tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    for step in range(10, 110, 10):
        commit(mesh, run, step)
    assert prune_checkpoints(run, keep_last=0) == []
    assert prune_checkpoints(run, keep_last=2, keep_every=40) == [70, 60, 50, 30, 20, 10]
    assert committed_steps(run) == [100, 90, 80, 40]
    assert not list(run.glob(".tmp-*"))


def test_leftovers_are_removed_and_nothing_else(mesh: ProcessMesh, tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    commit(mesh, run, 1)
    (run / ".tmp-2-abc").mkdir()
    (run / ".tmp-2-abc" / FILES[0]).touch()
    (run / "latest.0123abcd.part").touch()
    (run / "samples").mkdir()
    assert [path.name for path in remove_leftovers(run)] == [".tmp-2-abc", "latest.0123abcd.part"]
    assert (run / "samples").is_dir()
    assert committed_steps(run) == [1]

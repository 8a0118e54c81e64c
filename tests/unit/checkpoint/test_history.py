"""One run directory holds one line of history, whatever is trained, saved, killed and resumed in it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from sat_train.checkpoint.find import find_resume_point
from sat_train.checkpoint.history import read_latest, rewind
from sat_train.checkpoint.layout import LATEST, committed_steps
from sat_train.checkpoint.retention import prune_checkpoints
from sat_train.distributed.processes import ProcessMesh
from sat_train.interchange.sources import find_weights
from tests.unit.checkpoint.folders import commit, holds_step, run_directory, run_killed

SEEDS = 12
OPERATIONS = 12


def newest_by_all(run: Path) -> set[int | None]:
    """Returns what each of those that take the newest step takes."""
    point = find_resume_point(
        "auto", save_root=run.parent, experiment_name="exp", is_alive=lambda folder: False
    )
    assert point is not None
    return {point.step, read_latest(run), int(find_weights(run).path.name)}


def all_saves(run: Path) -> set[int]:
    """Returns which saves are still on disk, visible or set aside: each has a manifest of its own."""
    return {path.stat().st_ino for path in run.glob("*/manifest.json")}


def test_going_back_sets_later_steps_aside_and_says_so(
    mesh: ProcessMesh, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_directory(tmp_path)
    for step in (3, 6, 9, 12):
        commit(mesh, run, step)
    assert rewind(run, 3) == [12, 9, 6]
    assert newest_by_all(run) == {3}
    assert all(holds_step(run / f"{step}.abandoned", step) for step in (6, 9, 12))
    assert "going back to step 3: step 12 is set aside as" in caplog.text
    for step in (4, 5):
        commit(mesh, run, step)
        prune_checkpoints(run, keep_last=2, keep_every=3, resumed_step=3)
        assert newest_by_all(run) == {step}
    assert committed_steps(run) == [5, 4, 3]
    commit(mesh, run, 6)
    rewind(run, 5)
    assert (run / "6.abandoned.1").is_dir(), "what was set aside before stays"


def test_going_on_from_the_newest_step_touches_nothing(mesh: ProcessMesh, tmp_path: Path) -> None:
    run = run_directory(tmp_path)
    for step in (3, 6):
        commit(mesh, run, step)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert rewind(run, 6) == []
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_step_that_cannot_be_set_aside_stops_the_run(
    mesh: ProcessMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_directory(tmp_path)
    for step in (3, 6):
        commit(mesh, run, step)

    def refused(source: object, target: object) -> None:
        raise OSError(30, "Read-only file system", str(source))

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(OSError, match="Read-only"):
        rewind(run, 3)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_order_of_saves_kills_and_returns_keeps_one_line(
    mesh: ProcessMesh, tmp_path: Path, seed: int
) -> None:
    """The model: `line` holds the steps of the current line that retention may not have deleted."""
    rng = random.Random(seed)
    run = run_directory(tmp_path)
    keep_last = rng.choice([1, 2, 3])
    commit(mesh, run, 1)
    step, resumed, line = 1, 1, [1]
    for _ in range(OPERATIONS):
        kind = rng.choice(["save", "save", "killed save", "return", "killed return", "auto"])
        if kind.endswith("save"):
            step += rng.randint(1, 3)

            def save(step: int = step, resumed: int = resumed) -> None:
                commit(mesh, run, step)
                prune_checkpoints(run, keep_last=keep_last, resumed_step=resumed)

            if kind == "save":
                save()
                assert step in committed_steps(run), "the step just committed was deleted"
                assert resumed in committed_steps(run), "the step resumed from was deleted"
            elif run_killed(save, rng.randint(1, 25)):
                kind = "auto"
            line.append(step)
        if kind.endswith("return"):
            target = rng.choice(committed_steps(run))
            before = all_saves(run)
            if kind == "killed return":
                run_killed(lambda target=target: rewind(run, target), rng.randint(1, 10))
                assert set(committed_steps(run)) <= set(line), "a kill mixed two lines"
            rewind(run, target)
            assert all_saves(run) == before, "going back deleted something"
            step = resumed = target
        if kind == "auto":
            step = resumed = committed_steps(run)[0]
            rewind(run, step)
        line = [other for other in line if other <= step]
        assert committed_steps(run)[0] == step
        assert set(committed_steps(run)) <= set(line), "a step of another line is visible"
        assert newest_by_all(run) == {step}
        assert (run / LATEST).read_text() == str(step)

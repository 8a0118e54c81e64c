"""A step that rank 0 committed alone, without callbacks, is like any other once the run is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sat_train.checkpoint.history import read_best
from sat_train.checkpoint.layout import committed_steps
from sat_train.checkpoint.retention import prune_checkpoints
from sat_train.distributed.processes import start_single_process
from sat_train.training.callbacks.best_checkpoint import BestCheckpoint
from sat_train.training.callbacks.metrics_file import NAME
from tests.unit.checkpoint.folders import commit, run_directory

LOSSES = ([0.3, 0.1, 0.2], [0.3, 0.2, 0.1], [0.1, 0.2, 0.3], [0.2, 0.1, 0.1])


def _start(run: Path, step: int) -> BestCheckpoint:
    best = BestCheckpoint(run)
    best.started(SimpleNamespace(state=SimpleNamespace(step=step)))  # type: ignore[arg-type]
    return best


def _save(run: Path, step: int, best: BestCheckpoint) -> None:
    commit(start_single_process(), run, step)
    best.saved(step)
    prune_checkpoints(run, keep_last=1, best_step=best.step)


@pytest.mark.parametrize("losses", LOSSES)
def test_best_and_retention_are_those_of_a_run_that_did_not_fail(tmp_path: Path, losses: list[float]) -> None:
    left = []
    for name, fails in (("straight", False), ("failed", True)):
        run = run_directory(tmp_path, name=name)
        records = [{"step": step, "valid_loss": loss} for step, loss in enumerate(losses, start=1)]
        (run / NAME).write_text("".join(json.dumps(record) + "\n" for record in records))
        best = _start(run, step=3)
        _save(run, 1, best)
        _save(run, 2, best)
        if fails:
            commit(start_single_process(), run, 3)  # alone: the process ends without a callback
            assert read_best(run) in committed_steps(run)
            best = _start(run, step=3)
        else:
            _save(run, 3, best)
        at_resume = read_best(run)
        _save(run, 4, best)
        left.append((at_resume, read_best(run), committed_steps(run)))
    assert left[0] == left[1]

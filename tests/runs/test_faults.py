"""Faults at random moments: `benchmarks/faults.py`, short and with a seed that draws six kinds of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.fault_parts.trials import Recipe
from benchmarks.faults import run_trials, table

SEED, TRIALS = 147, 6
RECIPES = (Recipe("lora", 3, "on"), Recipe("sft", 1, "off"))


@pytest.mark.ranks
@pytest.mark.slow
def test_a_resumed_run_has_kept_everything_whatever_went_wrong(tmp_path: Path) -> None:
    verdicts = list(run_trials(TRIALS, seed=SEED, root=tmp_path, recipes=RECIPES))
    assert len({verdict.kind for verdict in verdicts}) == TRIALS
    broken = [verdict for verdict in verdicts if verdict.problems]
    assert not broken, f"{table(verdicts)}\n{broken[0].kind}: {broken[0].problems}\n{broken[0].output}"

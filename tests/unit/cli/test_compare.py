"""`sat-train compare`: verdicts, exit codes, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sat_train.cli.main import main
from sat_train.training.expected_curve import ExpectedCurve, write_card
from sat_train.training.loop.clip_losses import ClipLosses

CLIPS = [f"clip{number}" for number in range(8)]


def losses(shift: float, *, clips=CLIPS, timesteps=(250, 750)) -> ClipLosses:
    """Clips that differ far more among each other than by the shift."""
    rows = {clip: tuple(0.2 * n + t / 1000 + shift for t in timesteps) for n, clip in enumerate(clips)}
    return ClipLosses(timesteps, rows)


def run_of(folder: Path, curve: dict[int, ClipLosses]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"step": step, **at.as_json()}) for step, at in curve.items()]
    (folder / "validation.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def runs(tmp_path) -> dict[str, Path]:
    """A run, one that ends lower and one that began lower."""
    return {
        "plain": run_of(tmp_path / "plain", {0: losses(0.0), 10: losses(-0.10), 30: losses(-0.2)}),
        "lower": run_of(tmp_path / "lower", {0: losses(0.0), 10: losses(-0.11), 20: losses(-0.2)}),
        "early": run_of(tmp_path / "early", {0: losses(-0.1), 10: losses(-0.10)}),
    }


@pytest.mark.parametrize(
    ("run", "other", "code", "last"),
    [
        ("plain", "lower", 1, "10    1.10000    1.09000  +0.01000 (+0.01000 to +0.01000)  worse"),
        ("lower", "plain", 0, "10    1.09000    1.10000  -0.01000 (-0.01000 to -0.01000)  better"),
        ("plain", "early", 0, "no difference shown"),
    ],
)
def test_the_verdict_is_that_of_the_last_step_that_both_have_validated(runs, capsys, run, other, code, last):
    assert main(["compare", str(runs[run]), str(runs[other])]) == code
    table = capsys.readouterr().out
    assert "paired on 8 clips" in table
    assert last in table
    assert "at step 10, by timestep" in table


def test_a_run_is_placed_in_the_band_of_a_card(runs, tmp_path, capsys):
    seeds = {n: {0: losses(0.001 * n), 10: losses(-0.2 + 0.001 * n)} for n in range(3)}
    write_card(tmp_path / "card.json", ExpectedCurve.of_runs("r", base=("b",), words=(), runs=seeds))
    assert main(["compare", str(runs["plain"]), str(tmp_path / "card.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[-2:]] == ["inside", "above"]
    good = run_of(tmp_path / "good", {0: losses(0.5), 10: losses(-0.2)})
    assert main(["compare", str(good), str(tmp_path / "card.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[-2:]] == ["above", "inside"]


def test_a_few_clips_in_common_give_a_difference_and_no_verdict(runs, tmp_path, capsys):
    other = run_of(tmp_path / "few", {10: losses(-0.3, clips=[*CLIPS[:3], "x"])})
    assert main(["compare", str(runs["plain"]), str(other)]) == 0
    assert "+0.20000  too few clips to tell" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused_with_the_reason(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.json").write_text("[1, 2]")
    others = {
        tmp_path / "empty": "holds no validation.jsonl with a validation in it",
        tmp_path / "nothing": "No such file or directory",
        tmp_path / "text.json": "expected: a card of docs/recipes/",
        run_of(tmp_path / "t", {10: losses(0.0, timesteps=(500,))}): "validated on other clips or timesteps",
        run_of(tmp_path / "c", {10: losses(0.0, clips=["x"])}): "validated on other clips or timesteps",
        run_of(tmp_path / "s", {7: losses(0.0)}): "have no validated step in common",
    }
    for other, message in others.items():
        assert main(["compare", str(runs["plain"]), str(other)]) == 2
        assert message in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "empty"), str(runs["plain"])]) == 2
    (tmp_path / "t" / "validation.jsonl").write_text('{"step": 3, "clips": 5}\n')
    assert main(["compare", str(tmp_path / "t"), str(runs["plain"])]) == 2
    assert "the validation losses of a run" in capsys.readouterr().err

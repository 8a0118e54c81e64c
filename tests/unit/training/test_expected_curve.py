"""Cards of expected curves: a band holds one more seed as often as it says, and the kept cards are whole."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from sat_train.errors import DataError
from sat_train.training.expected_curve import ExpectedCurve, read_card, write_card
from sat_train.training.loop.clip_losses import ClipLosses

ROOT = Path(__file__).parents[3]
CARDS = sorted((ROOT / "docs/recipes").glob("*.json"))


def card_of(losses: dict[int, tuple[float, ...]]) -> ExpectedCurve:
    seeds = tuple(range(len(next(iter(losses.values())))))
    return ExpectedCurve("r", ("r.yaml",), (), seeds, ("a", "b"), (500,), losses)


def test_the_band_of_three_seeds_holds_a_fourth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(0.3, 0.05, size=(4000, 4))
    card = card_of({step: tuple(row[:3]) for step, row in enumerate(draws.tolist())})
    inside = sum(card.place(step, float(row[3])) == "inside" for step, row in enumerate(draws))
    assert inside / 4000 == pytest.approx(0.95, abs=0.012)


def test_a_loss_is_below_inside_or_above_and_seeds_that_agree_leave_room_for_rounding():
    card = card_of({0: (0.5, 0.5, 0.5)})
    assert [card.place(0, loss) for loss in (0.499, 0.4996, 0.5004, 0.501)] == [
        *("below", "inside", "inside", "above")
    ]
    assert card.place(0, math.nan) == "above"


def test_a_card_comes_back_from_its_file_and_refuses_runs_of_other_clips(tmp_path):
    validations = [{0: ClipLosses((500,), {"a": (x,), "b": (2 * x,)})} for x in (0.1, 0.2, 0.4)]
    runs = dict(enumerate(validations))
    card = ExpectedCurve.of_runs("r", base=("r.yaml",), words=("args.lr=1",), runs=runs)
    assert card.losses[0] == pytest.approx((0.15, 0.3, 0.6))
    write_card(tmp_path / "r.json", card)
    assert read_card(tmp_path / "r.json") == card
    card.check_comparable(validations[0][0], where=tmp_path)
    for other in (ClipLosses((500,), {"a": (1.0,)}), ClipLosses((400,), {"a": (1.0,), "b": (1.0,)})):
        with pytest.raises(DataError, match=r"not those of the card of r\n.*the 2 clips.*\n.*--base r.yaml"):
            card.check_comparable(other, where=tmp_path)


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_kept_card_says_that_the_recipe_learns_and_the_page_shows_its_last_loss(path):
    card = read_card(path)
    steps = sorted(card.losses)
    assert (steps[0], steps[-1], len(card.seeds)) == (0, 300, 3)
    assert max(card.losses[300]) < min(card.losses[0])
    assert all((ROOT / each).exists() for each in card.base)
    row = re.search(rf"^\| `{card.recipe}` \| (\S+) ", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)
    assert row is not None
    assert float(row[1]) == pytest.approx(math.fsum(card.losses[300]) / 3, abs=6e-5)

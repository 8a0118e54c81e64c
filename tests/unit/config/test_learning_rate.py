"""Laws of the learning rate."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from transformers import (
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from sat_train.config.learning_rate import SHAPES, LearningRate, build_learning_rate, warmup_steps
from sat_train.config.schema.args import ArgsConfig

STYLES = ["constant", *SHAPES]
ROUNDING = 1 + 1e-12


def random_rates(count: int) -> Iterator[tuple[LearningRate, int]]:
    """Yields random settings, and the length of a run: with and without warm-up, longer and shorter than the
    decay, warm-ups beyond its end too."""
    dice = random.Random(0)
    for _ in range(count):
        iters = dice.choice([1, 2, 7, 50, 300])
        args = ArgsConfig(
            lr=dice.choice([0.0, 1e-5, 1.0, 3.7]),
            warmup=dice.choice([0.0, 0.01, 0.3, float(dice.randint(1, 60))]),
            lr_decay_style=dice.choice(STYLES),
            lr_decay_iters=dice.choice([None, dice.randint(1, 2 * iters)]),
            lr_decay_ratio=dice.choice([0.0, 0.1, dice.random(), 1.0]),
            lr_decay_power=dice.choice([0.3, 1.0, 2.0, 9.0]),
            lr_decay_cycles=dice.choice([1, 2, 5]),
            lr_decay_share=dice.choice([1e-3, 0.1, dice.uniform(0.01, 1), 1.0]),
        )
        yield build_learning_rate(args, iters), iters


def test_a_thousand_random_curves_keep_the_laws() -> None:
    styles = set()
    for rate, iters in random_rates(1000):
        rates = [rate.at(step) for step in range(iters + 20)]
        warmup, end = rate.warmup_steps, max(rate.decay_end, rate.warmup_steps)
        assert all(math.isfinite(each) and 0 <= each <= rate.peak * ROUNDING for each in rates), rate
        assert all(each >= rate.floor_ratio * rate.peak / ROUNDING for each in rates[warmup:]), rate
        assert rates[:warmup] == [rate.peak * (step + 1) / warmup for step in range(warmup)][: len(rates)]
        if rate.style != "cosine_with_restarts" or rate.cycles == 1:
            pairs = itertools.pairwise(rates[warmup:])
            assert all(later <= earlier * ROUNDING for earlier, later in pairs), rate
        if rate.style != "constant" and end > warmup:
            assert rates[end:] == [rate.peak * rate.floor_ratio] * len(rates[end:]), rate
        said = [
            (float(value), int(step.replace(",", "")))
            for value, step in re.findall(r"\w+ (\S+) at step ([\d,]+)", rate.describe(iters))
        ]
        run = rates[:iters]
        expected = [(run[0], 1), (max(run), run.index(max(run)) + 1), (run[-1], iters)]
        assert said == [(pytest.approx(value, rel=5e-3), step) for value, step in expected], rate
        styles.add(rate.style)
    assert styles == set(STYLES)


OTHERS = {
    "linear": lambda optimizer: get_linear_schedule_with_warmup(optimizer, 10, 90),
    "polynomial": lambda optimizer: get_polynomial_decay_schedule_with_warmup(
        optimizer, 10, 90, lr_end=0.2, power=3.0
    ),
    "cosine_with_restarts": lambda optimizer: get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer, 10, 90, num_cycles=3
    ),
    "wsd": lambda optimizer: get_wsd_schedule(
        optimizer, num_warmup_steps=10, num_stable_steps=62, num_decay_steps=18, decay_type="1-sqrt",
        min_lr_ratio=0.1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("style", OTHERS)
def test_shapes_are_those_of_transformers(style: str) -> None:
    """After the warm-up, which begins at zero there. `wsd` takes the root of a rounding error."""
    floor = 0.1 if style in ("polynomial", "wsd") else 0.0
    rate = LearningRate(2.0, 10, style, 90, floor, power=3.0, cycles=3, decay_share=0.2)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = OTHERS[style](optimizer)
    theirs = []
    for _ in range(100):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [rate.at(step) for step in range(10, 100)] == pytest.approx(theirs[10:], abs=1e-7)


def test_special_cases_of_a_shape_are_the_simpler_shape() -> None:
    linear = LearningRate(2.0, 10, "linear", 100, 0.1)
    pairs = [
        (replace(linear, style="polynomial", power=1.0), linear),
        (replace(linear, style="cosine_with_restarts"), replace(linear, style="cosine")),
        (replace(linear, style="cosine", floor_ratio=1.0), replace(linear, style="constant")),
    ]
    for one, other in pairs:
        assert [one.at(step) for step in range(120)] == [other.at(step) for step in range(120)]


def test_golden_rates() -> None:
    """These curves have trained runs that may be resumed."""
    rates = {style: LearningRate(2e-5, 10, style, 100, 0.1) for style in ("constant", "cosine", "linear")}
    assert {style: [rate.at(step) for step in (0, 9, 10, 42, 99, 120)] for style, rate in rates.items()} == {
        "constant": [2.0000000000000003e-06, 2e-05, 2e-05, 2e-05, 2e-05, 2e-05],
        "cosine": [
            2.0000000000000003e-06,
            2e-05,
            2e-05,
            1.4945340321101698e-05,
            2.005482556828138e-06,
            2.0000000000000003e-06,
        ],
        "linear": [
            2.0000000000000003e-06,
            2e-05,
            2e-05,
            1.36e-05,
            2.1999999999999997e-06,
            2.0000000000000003e-06,
        ],
    }


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.01, 10), (0.5, 500), (1, 1), (100, 100)])
def test_a_warm_up_is_a_share_or_a_number_of_steps(warmup: float, steps: int) -> None:
    assert warmup_steps(warmup, 1000) == steps

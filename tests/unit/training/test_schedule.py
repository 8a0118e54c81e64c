"""Laws of the learning rate."""

import itertools

import pytest

from sat_train.training.loop.learning_rate import LearningRate, warmup_steps

STYLES = ["constant", "cosine", "linear"]


def _rates(style: str, *, warmup: int = 10, decay_end: int = 100, floor: float = 0.1) -> list[float]:
    rate = LearningRate(peak=2.0, warmup_steps=warmup, style=style, decay_end=decay_end, floor_ratio=floor)
    return [rate.at(step) for step in range(150)]


@pytest.mark.parametrize("style", STYLES)
def test_the_warm_up_is_a_line_to_the_peak_that_does_not_begin_at_zero(style):
    assert _rates(style)[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert _rates(style)[10] == pytest.approx(2.0)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("decay_end", [5, 10, 100, 1000])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_it_is_never_negative_never_above_the_peak_and_never_rises_after_the_warm_up(style, decay_end, floor):
    rates = _rates(style, decay_end=decay_end, floor=floor)
    assert all(0 <= rate <= 2.0 for rate in rates)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_it_ends_at_the_floor_and_stays_there(style):
    assert _rates(style)[100:] == pytest.approx([0.2] * 50)
    assert _rates(style)[55] == pytest.approx(1.1)  # half way down, by symmetry


def test_constant_stays():
    assert set(_rates("constant")[10:]) == {2.0}


def test_without_warm_up_the_first_step_has_the_peak():
    assert _rates("cosine", warmup=0)[0] == 2.0


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.01, 10), (0.5, 500), (1, 1), (100, 100)])
def test_a_warm_up_is_a_share_or_a_number_of_steps(warmup, steps):
    assert warmup_steps(warmup, 1000) == steps

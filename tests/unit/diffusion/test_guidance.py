"""Guidance scales."""

import math

import pytest

from sat_train.diffusion.constant_guidance import ConstantGuidance
from sat_train.diffusion.dynamic_guidance import DynamicGuidance


def test_constant_guidance_needs_no_second_evaluation_at_scale_one():
    assert not ConstantGuidance(1.0).needs_null
    assert ConstantGuidance(6.0).needs_null
    assert {ConstantGuidance(6.0).scale_at(timestep, 50) for timestep in range(1000)} == {6.0}


def test_dynamic_guidance_is_the_released_formula():
    guidance = DynamicGuidance(scale=6.0, exp=5.0)
    for timestep in range(1000):
        share = (50 - timestep) / 50
        expected = 1 + 6.0 * ((1 - math.cos(math.pi * share**5.0)) / 2)
        assert guidance.scale_at(timestep, 50) == pytest.approx(expected, abs=1e-12)
        assert 1.0 <= guidance.scale_at(timestep, 50) <= 7.0


def test_an_exponent_that_gives_complex_scales_is_refused():
    with pytest.raises(AssertionError, match="not a whole number"):
        DynamicGuidance(exp=2.5)

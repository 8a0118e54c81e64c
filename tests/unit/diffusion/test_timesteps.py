"""Which timesteps are trained on, and which a sampler visits."""

import math

import pytest
import torch

from sat_train.config.parts.timestep_parts import TimestepsConfig
from sat_train.diffusion.timesteps import sampling_timesteps, stratify, timesteps_at


def normal(z: float) -> float:
    """Distribution function of the normal law."""
    return math.erfc(-z / 2**0.5) / 2


def truncated(position: float, mean: float, std: float, low: float, high: float) -> float:
    below, above = normal((low - mean) / std), normal((high - mean) / std)
    return (normal((position - mean) / std) - below) / (above - below)


# Settings of each law, with its distribution function written out.
LAWS = [
    ("Uniform", {}, lambda x: x),
    ("LogitNormal", {}, lambda x: normal(math.log(x / (1 - x)))),
    ("LogitNormal", {"mean": 1.5, "std": 0.5}, lambda x: normal((math.log(x / (1 - x)) - 1.5) / 0.5)),
    ("TruncatedNormal", {}, lambda x: truncated(x, 0.5, 0.25, 0, 1)),
    (
        "TruncatedNormal",
        {"mean": 0.95, "std": 0.1, "low": 0.6},
        lambda x: truncated(x, 0.95, 0.1, 0.6, 1),
    ),
    ("TruncatedNormal", {"mean": -0.2, "std": 0.05, "low": 0.1}, lambda x: truncated(x, -0.2, 0.05, 0.1, 1)),
]
JUST_BELOW_1 = math.nextafter(1.0, 0.0)


@pytest.mark.parametrize(("name", "params", "cumulative"), LAWS)
def test_a_law_is_the_inverse_of_its_distribution_function(name, params, cumulative):
    law = TimestepsConfig.of(name, params).build()
    uniform = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    position = law(uniform)
    assert [cumulative(x) for x in position.tolist()] == pytest.approx(uniform.tolist(), abs=1e-7)
    edges = law(torch.tensor([0.0, 1e-300, JUST_BELOW_1], dtype=torch.float64))
    both = torch.cat([edges[:2], position, edges[2:]])
    assert bool((both.diff() >= 0).all())
    assert params.get("low", 0) <= float(both.min())
    assert float(both.max()) <= params.get("high", 1)
    timesteps = timesteps_at(both, 1000)
    assert 0 <= int(timesteps.min()) <= int(timesteps.max()) <= 999


def test_uniform_timesteps_cover_the_range_evenly():
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(timesteps_at(uniform, 10), minlength=10)
    # 20000 expected in each, standard deviation 134
    assert counts.shape == (10,)
    assert bool(((counts - 20_000).abs() < 700).all())


def test_timesteps_never_leave_the_range():
    edges = torch.tensor([0.0, JUST_BELOW_1, 1.0], dtype=torch.float64)
    assert timesteps_at(edges, 1000).tolist() == [0, 999, 999]


@pytest.mark.parametrize("num_strata", [1, 2, 7, 64, 1500])
def test_each_stratum_gets_its_own_part_of_the_range(num_strata):
    stratum = torch.arange(num_strata)
    uniform = torch.rand(num_strata, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    timesteps = timesteps_at(stratify(uniform, stratum, num_strata), 1000)
    assert bool((timesteps >= stratum * 1000 // num_strata).all())
    assert bool((timesteps <= (stratum + 1) * 1000 // num_strata).all())
    assert 0 <= int(timesteps.min()) <= int(timesteps.max()) <= 999


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 50, 600, 1000])
def test_a_trailing_path_is_unbroken_from_pure_noise_to_clean(steps):
    path = sampling_timesteps(steps)
    assert len(path) == steps
    assert path[0][0] == 999
    assert path[-1][1] is None
    assert [reached for _, reached in path[:-1]] == [timestep for timestep, _ in path[1:]]
    assert all(timestep > reached for timestep, reached in path[:-1])


def test_linspace_goes_from_one_end_to_the_other():
    path = sampling_timesteps(50, spacing="linspace")
    assert path[0][0] == 999
    assert path[-1] == (0, None)


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_step_counts_are_refused(steps):
    with pytest.raises(AssertionError, match=rf"steps = {steps} is not in \[1, 1000\]"):
        sampling_timesteps(steps)

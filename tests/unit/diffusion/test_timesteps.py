"""Which timesteps are trained on, and which a sampler visits."""

import pytest
import torch

from sat_train.diffusion.timesteps import sampling_timesteps, stratified_timesteps, uniform_timesteps


def test_uniform_timesteps_cover_the_range_evenly():
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(uniform_timesteps(uniform, 10), minlength=10)
    # 20000 expected in each, standard deviation 134
    assert counts.shape == (10,)
    assert bool(((counts - 20_000).abs() < 700).all())


def test_uniform_timesteps_never_leave_the_range():
    edges = torch.tensor(
        [0.0, torch.nextafter(torch.tensor(1.0).double(), torch.tensor(0.0).double())]
    ).double()
    assert uniform_timesteps(edges, 1000).tolist() == [0, 999]


@pytest.mark.parametrize("num_strata", [1, 2, 7, 64, 1500])
def test_each_stratum_gets_its_own_part_of_the_range(num_strata):
    stratum = torch.arange(num_strata)
    uniform = torch.rand(num_strata, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    timesteps = stratified_timesteps(uniform, stratum, num_strata, 1000)
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

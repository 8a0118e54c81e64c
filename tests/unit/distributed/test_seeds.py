"""Seeds are pure functions of their arguments, the same in every process and version."""

import itertools

import torch

from sat_train.distributed.seeds import derive_generator, derive_seed


def test_the_values_are_fixed_for_ever():
    """A change here changes the data and noise of every run that is resumed."""
    assert derive_seed(1, "noise", 3) == 249376906845828780
    assert 0 <= derive_seed(1, "noise", 3) < 2**63


def test_other_arguments_give_other_seeds():
    arguments = [
        (seed, purpose, *keys)
        for seed in (0, 1)
        for purpose in ("noise", "crop")
        for keys in ((), (0,), (1,), (0, 1), (1, 0), (11,))
    ]
    assert len({derive_seed(*each) for each in arguments}) == len(arguments)


def test_generators_are_fresh_and_equal():
    first, second = (torch.randn(4, generator=derive_generator(7, "noise", 2)) for _ in range(2))
    assert torch.equal(first, second)


def test_seeds_spread_over_all_bits():
    seeds = [derive_seed(0, "noise", key) for key in range(2000)]
    ones = [sum(seed >> bit & 1 for seed in seeds) for bit in range(63)]
    # 2000 fair coins: six standard deviations are 134
    assert all(abs(count - 1000) < 134 for count in ones)
    assert len(set(itertools.accumulate(seeds, max))) < 40

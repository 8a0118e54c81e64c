from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from sat_train.testing.pool import RankPool
from tests.forks import start_fork


@pytest.fixture(scope="session")
def living_ranks() -> Iterator[RankPool]:
    """The processes behind `rank_pool`."""
    pool = RankPool(start_fork)
    yield pool
    pool.close()


@pytest.fixture(scope="module", autouse=True)
def _fresh_ranks(living_ranks: RankPool) -> None:
    """A file that comes after many runs gets new processes."""
    living_ranks.renew()


@pytest.fixture(scope="session")
def rank_pool(living_ranks: RankPool) -> Callable[[int], Callable[..., list[Any]]]:
    """`rank_pool(world_size)(function, *args, model_parallel_size=1)` -> the result of every rank.

    `function(mesh, *args)` is a module-level function of the test file; groups are made again for every call.
    """
    return lambda world_size: partial(living_ranks.run, world_size)

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.ranks.pool import RankPool


@pytest.fixture(scope="session")
def _pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def rank_pool(_pool: RankPool) -> Callable[[int], Callable[..., list[Any]]]:
    """`rank_pool(world_size)(function, *args, model_parallel_size=1)` -> the result of every rank.

    `function(grid, *args)` is a module-level function of the test file; groups are made anew for every call.
    """
    return lambda world_size: partial(_pool.run, world_size)

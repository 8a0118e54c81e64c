from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from tests.ranks.pool import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], Callable[..., list[Any]]]]:
    """`rank_pool(world_size)(function, *args, model_parallel_size=1)` -> the result of every rank.

    `function(mesh, *args)` is a module-level function of the test file; groups are made again for every call.
    """
    pool = RankPool()
    yield lambda world_size: partial(pool.run, world_size)
    pool.close()

"""Laws of the process grid and its collectives, on real gloo processes."""

import pytest
import torch
import torch.distributed as dist

from sat_train.distributed.collectives import (
    broadcast_object,
    check_all_ranks,
    gather_objects,
    max_flags,
    sum_over_data,
)
from sat_train.distributed.processes import ProcessGrid
from sat_train.errors import DataError, SatTrainError
from tests.ranks.pool import RankFailure

pytestmark = pytest.mark.ranks


def _place(grid: ProcessGrid) -> tuple[int, ...]:
    ones = torch.ones(1)
    dist.all_reduce(ones, group=grid.model_group)
    summed = sum_over_data(grid, torch.tensor([float(grid.rank)]))
    return grid.rank, grid.data_rank, grid.data_size, grid.model_rank, grid.model_size, int(ones), int(summed)


def test_the_model_axis_is_the_inner_one(rank_pool):
    assert rank_pool(2)(_place) == [(0, 0, 2, 0, 1, 1, 1), (1, 1, 2, 0, 1, 1, 1)]
    assert rank_pool(2)(_place, model_parallel_size=2) == [(0, 0, 1, 0, 2, 2, 0), (1, 0, 1, 1, 2, 2, 1)]


def _exchange(grid: ProcessGrid) -> tuple[object, ...]:
    flags = torch.tensor([grid.rank, 1 - grid.rank])
    name = broadcast_object(grid, {"name": "run"} if grid.rank == 0 else None)
    return name, gather_objects(grid, grid.rank), max_flags(grid, flags).tolist()


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_learns_the_same(rank_pool, world_size):
    results = rank_pool(world_size)(_exchange)
    assert results == [({"name": "run"}, list(range(world_size)), [world_size - 1, 1])] * world_size


def _agree(grid: ProcessGrid) -> str:
    error = DataError("no clip in /nowhere") if grid.rank == 1 else None
    try:
        check_all_ranks(grid, error)
    except SatTrainError as raised:
        check_all_ranks(grid, None)  # nobody is left waiting in the first one
        return str(raised)
    return ""


def test_one_rank_s_error_is_raised_on_all(rank_pool):
    assert rank_pool(2)(_agree) == ["rank 1: no clip in /nowhere", "no clip in /nowhere"]


def _fail_on_one(grid: ProcessGrid) -> None:
    if grid.rank == 1:
        raise ValueError("this rank is broken")
    dist.barrier()


def test_the_pool_reports_a_failing_rank_and_lives_on(rank_pool):
    with pytest.raises(RankFailure, match="this rank is broken"):
        rank_pool(2)(_fail_on_one)
    assert len(rank_pool(2)(_place)) == 2

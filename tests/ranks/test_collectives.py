"""Laws of the process mesh and its collectives, on real gloo processes."""

import pytest
import torch
import torch.distributed as dist

from sat_train.distributed.collectives import (
    broadcast_object,
    check_all_ranks,
    gather_objects,
    gather_pixels,
    max_flags,
    sum_over_data,
)
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import DataError, SatTrainError
from sat_train.testing.pool import FailedOnRank

pytestmark = pytest.mark.ranks


def _place(mesh: ProcessMesh) -> tuple[int, ...]:
    ones = torch.ones(1)
    dist.all_reduce(ones, group=mesh.model_group)
    summed = sum_over_data(mesh, torch.tensor([float(mesh.rank)]))
    return mesh.rank, mesh.data_rank, mesh.data_size, mesh.model_rank, mesh.model_size, int(ones), int(summed)


def test_the_model_axis_is_the_inner_one(rank_pool):
    assert rank_pool(2)(_place) == [(0, 0, 2, 0, 1, 1, 1), (1, 1, 2, 0, 1, 1, 1)]
    assert rank_pool(2)(_place, model_parallel_size=2) == [(0, 0, 1, 0, 2, 2, 0), (1, 0, 1, 1, 2, 2, 1)]


def _exchange(mesh: ProcessMesh) -> tuple[object, ...]:
    flags = torch.tensor([mesh.rank, 1 - mesh.rank])
    name = broadcast_object(mesh, {"name": "run"} if mesh.rank == 0 else None)
    return name, gather_objects(mesh, mesh.rank), max_flags(mesh, flags).tolist()


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_learns_the_same(rank_pool, world_size):
    results = rank_pool(world_size)(_exchange)
    assert results == [({"name": "run"}, list(range(world_size)), [world_size - 1, 1])] * world_size


def _gather_pixels(mesh: ProcessMesh, counts: list[int]) -> list[dict[int, torch.Tensor]]:
    return gather_pixels(mesh, {number: _picture(mesh.rank, number) for number in range(counts[mesh.rank])})


def _picture(rank: int, number: int) -> torch.Tensor:
    return torch.full((2, 3, 4 + rank, 5 + number), 16 * rank + number, dtype=torch.uint8)


@pytest.mark.parametrize("counts", [[2, 3], [0, 1], [0, 0], [2]])
def test_pixels_of_all_ranks_come_to_rank_0(rank_pool, counts):
    first, *others = rank_pool(len(counts))(_gather_pixels, counts)
    assert others == [[] for _ in counts[1:]]
    assert [sorted(share) for share in first] == [list(range(count)) for count in counts]
    for rank, share in enumerate(first):
        assert all(torch.equal(pixels, _picture(rank, number)) for number, pixels in share.items())


def _agree(mesh: ProcessMesh) -> str:
    error = DataError("no clip in /nowhere") if mesh.rank == 1 else None
    try:
        check_all_ranks(mesh, error)
    except SatTrainError as raised:
        check_all_ranks(mesh, None)  # nobody is left waiting in the first one
        return str(raised)
    return ""


def test_one_rank_s_error_is_raised_on_all(rank_pool):
    assert rank_pool(2)(_agree) == ["rank 1: no clip in /nowhere", "no clip in /nowhere"]


def _fail_on_one(mesh: ProcessMesh) -> None:
    if mesh.rank == 1:
        raise ValueError("this rank is broken")
    dist.barrier()


def test_the_pool_reports_a_failing_rank_and_lives_on(rank_pool):
    with pytest.raises(FailedOnRank, match="this rank is broken"):
        rank_pool(2)(_fail_on_one)
    assert len(rank_pool(2)(_place)) == 2

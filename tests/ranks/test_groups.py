"""Every group waits for as long as the run asks for, whoever has made it."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sat_train.distributed.processes import ProcessMesh
from sat_train.testing.pool import TIMEOUT_MINUTES
from tests.ranks.toy import build_toy, toy_run

pytestmark = pytest.mark.ranks


def _timeouts(mesh: ProcessMesh, zero_stage: int) -> list[timedelta]:
    """Returns the timeouts of all groups once SAT, DeepSpeed and this function have made theirs."""
    build_toy(mesh, toy_run(batch_size=1, zero_stage=zero_stage))
    dist.new_group([0, 1])
    groups = list(distributed_c10d._world.pg_map)
    assert {mesh.data_group, mesh.model_group} < set(groups)
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


@pytest.mark.parametrize(("zero_stage", "model_parallel_size"), [(1, 1), (3, 1), (2, 2)])
def test_the_timeout_of_the_run_is_that_of_every_group(rank_pool, zero_stage, model_parallel_size):
    for timeouts in rank_pool(2)(_timeouts, zero_stage, model_parallel_size=model_parallel_size):
        assert len(timeouts) >= 5
        assert set(timeouts) == {timedelta(minutes=TIMEOUT_MINUTES)}

"""Work is shared by who is free, and ranks that are far apart meet all the same, on real gloo processes."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.work_queue import WorkQueue, gather_after_work
from sat_train.encoding.cache.prune import verify_entries
from tests.ranks.encoded_runs import load_run, make_set, make_vae

pytestmark = pytest.mark.ranks

TIMEOUT_S, LATE_S = 5, 7  # of a collective; how much later one rank comes


def _limit(mesh: ProcessMesh) -> None:
    if mesh.world_size > 1:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT_S))


def _share(mesh: ProcessMesh, late_rank: int) -> tuple[list[int], list[int]]:
    _limit(mesh)
    queue = WorkQueue(mesh, "numbers", 20)
    if mesh.data_rank == late_rank and mesh.world_size > 1:  # nobody waits for one rank alone
        time.sleep(LATE_S)
    mine = []
    for number in queue:
        mine.append(number)
        queue.finish_one()
    together = gather_after_work(mesh, mine)
    again = gather_after_work(mesh, queue.num_finished())  # ranks meet more than once
    return sorted(number for part in together for number in part), again


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rank_that_comes_later_than_a_collective_waits_ends_nothing(rank_pool, world_size):
    for numbers, finished in rank_pool(world_size)(_share, world_size - 1):
        assert numbers == list(range(20))
        assert finished == [20] * world_size


def _take(mesh: ProcessMesh, close_after: int) -> list[int]:
    queue = WorkQueue(mesh, "numbers", 9)
    mine = []
    for number in queue:
        mine.append(number)
        if len(mine) == close_after:
            queue.close()
    gather_after_work(mesh, None)
    return mine


def test_ranks_that_share_a_model_get_the_same_work(rank_pool):
    assert rank_pool(2)(_take, 99, model_parallel_size=2) == [list(range(9))] * 2


def test_a_queue_that_one_rank_closes_hands_out_nothing_more_to_any(rank_pool):
    taken = rank_pool(2)(_take, 1)
    assert all(len(mine) <= 1 for mine in taken)
    assert any(taken)


def _precompute(mesh: ProcessMesh, words: list[str]) -> int:
    from sat_train.encoding.encode import EncodeAndKeep
    from sat_train.encoding.precompute import precompute

    keep, kept = EncodeAndKeep.keep, []

    def keep_slowly(self, batch):
        if mesh.rank == 1 and not kept:
            _limit(mesh)
            time.sleep(LATE_S)
        _limit(mesh)
        kept.append(batch.clip_ids)
        return keep(self, batch)

    EncodeAndKeep.keep = keep_slowly
    try:
        precompute(load_run(words, purpose="precompute"), mesh)
    finally:
        EncodeAndKeep.keep = keep
    return len(kept)


def test_precompute_survives_skew_and_gives_the_work_to_who_is_free(rank_pool, tmp_path: Path) -> None:
    words = [
        *(f"args.train_data=[{make_set(tmp_path / 'set', 'abc')}]", "args.valid_data=null"),
        *(f"model.first_stage_config.params.ckpt_path={make_vae(tmp_path / 'vae.pt')}",),
        *(f"data.cache_dir={tmp_path / 'cache'}", "data.params.views=3", "args.eval_interval=null"),
        *("args.valid_video_interval=null", "args.train_iters=4"),
    ]
    first, second = rank_pool(2)(_precompute, words)
    assert first + second == 9
    assert first > second
    assert verify_entries(tmp_path / "cache") == (12, [])

"""Several ranks fill one cache: nothing is lost, nothing torn, nothing encoded twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat_train.distributed.processes import ProcessMesh
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.index import CacheIndex
from sat_train.encoding.cache.prune import Staleness, list_entries, verify_entries
from tests.ranks.encoded_runs import load_run, make_set, make_vae

pytestmark = pytest.mark.ranks


def _precompute(mesh: ProcessMesh, words: list[str]) -> None:
    from sat_train.encoding.precompute import precompute

    precompute(load_run(words, purpose="precompute"), mesh)


def _missing(mesh: ProcessMesh, words: list[str]) -> bool:
    from sat_train.training.run_data import open_data

    return open_data(load_run(words), mesh).needs_encoders


def test_two_ranks_share_the_work_and_any_number_reads_it(rank_pool, tmp_path: Path) -> None:
    words = [
        *(f"args.train_data=[{make_set(tmp_path / 'set', 'abc')}]", "args.valid_data=null"),
        *(f"model.first_stage_config.params.ckpt_path={make_vae(tmp_path / 'vae.pt')}",),
        *(f"data.cache_dir={tmp_path / 'cache'}", "data.params.views=2", "data.cache_shard_mb=0.05"),
        "data.captions_at_once=2",
        *("args.eval_interval=null", "args.valid_video_interval=null", "args.train_iters=4"),
    ]
    rank_pool(2)(_precompute, words)
    lines, damaged = list_entries(tmp_path / "cache", Staleness(FileMetadata(tmp_path / "cache")))
    assert {line.kind: line.entries for line in lines} == {"clip": 6, "text": 3}
    assert not any(line.stale for line in lines), "an entry was made twice"
    assert (verify_entries(tmp_path / "cache")[1], damaged) == ([], [])
    before = len(list((tmp_path / "cache" / "shards").iterdir()))
    rank_pool(1)(_precompute, words)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == before
    assert rank_pool(2)(_missing, [*words, "data.cache=require"]) == [False, False]
    assert len(CacheIndex(tmp_path / "cache")) == 9

"""Data on real ranks: one list of clips, each sample once, one rank's fault on all."""

from __future__ import annotations

import pytest

from sat_train.config import load_run_config
from sat_train.data.batches import DataPosition
from sat_train.data.build import build_train_loader, sum_bad_clips
from sat_train.distributed.processes import ProcessMesh, start_single_process
from sat_train.errors import SatTrainError
from tests.unit.data.videos import make_folder

pytestmark = pytest.mark.ranks

CLIPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = make_folder(
        tmp_path_factory.mktemp("data") / "set", [f"{i:02d}" for i in range(CLIPS)], num_frames=30
    )
    return str(root)


def _loader(mesh: ProcessMesh, folder: str, words: list[str], start: int = 0):
    fixed = ["data.params.video_size=[32,32]", "data.params.max_num_frames=5", "data.params.fps=8"]
    fixed += ["args.train_iters=1", "args.num_workers=0", "data.params.max_upscale=8"]
    config = load_run_config([], [*fixed, f"args.train_data=[{folder}]", *words], check_paths=False)
    return build_train_loader(config, mesh, start=DataPosition(start))


def _take(mesh: ProcessMesh, folder: str, batch_size: int, count: int, start: int):
    """Returns index, clip and a hash of the pixels of each sample that this rank takes."""
    words = [f"args.batch_size={batch_size}", "data.params.short_clip=skip"]
    loader = _loader(mesh, folder, words, start)
    taken = []
    for _ in range(count):
        batch = next(loader)
        pixels = [int(sample.video_tchw.long().sum()) for sample in batch.samples]
        taken += zip(batch.sample_indices, batch.clip_ids, pixels, strict=True)
    return taken, loader.fingerprint


def test_any_number_of_ranks_takes_the_same_samples(rank_pool, folder):
    alone, fingerprint = _take(start_single_process(), folder, 6, 2, 0)
    assert [index for index, _, _ in alone] == list(range(CLIPS))
    assert len({clip for _, clip, _ in alone}) == CLIPS
    for size, batch_size, count in ((2, 3, 2), (3, 2, 2), (4, 3, 1)):
        results = rank_pool(size)(_take, folder, batch_size, count, 0)
        assert sorted(sample for taken, _ in results for sample in taken) == alone
        assert {print_ for _, print_ in results} == {fingerprint}
    later = rank_pool(2)(_take, folder, 2, 1, 8)  # resumed from 3 ranks, mid-epoch
    assert sorted(sample for taken, _ in later for sample in taken) == alone[8:12]


def test_ranks_that_share_a_model_take_the_same_samples(rank_pool, folder):
    one, other = rank_pool(2)(_take, folder, 2, 1, 0, model_parallel_size=2)
    assert one == other


def _refused(mesh: ProcessMesh, folder: str) -> str:
    try:
        _loader(mesh, folder, [])
    except SatTrainError as error:
        return str(error)
    return ""


def test_a_set_without_clips_is_refused_on_all_ranks(rank_pool, tmp_path):
    for text in rank_pool(2)(_refused, str(tmp_path)):
        assert "there is no clip in this folder" in text


def _sum_bad(mesh: ProcessMesh, folder: str, allowed: float) -> tuple[int, int, str]:
    loader = _loader(mesh, folder, ["args.batch_size=2", f"data.max_bad_fraction={allowed}"])
    for _ in range(2):
        next(loader)
    own = len(loader.failures.by_clip)
    try:
        return sum_bad_clips(mesh, loader), own, ""
    except SatTrainError as error:
        return -1, own, str(error)


def test_bad_clips_are_counted_once_over_the_ranks_and_end_all_of_them(rank_pool, tmp_path):
    make_folder(tmp_path, "abcdefgh", num_frames=30)
    dataset = _loader(start_single_process(), str(tmp_path), []).dataset
    bad = [dataset.record(dataset.order.clip_ref(index)).path for index in (1, 3)]  # one for each rank
    for path in bad:
        path.write_bytes(b"x" * 99)
    assert [result[:2] for result in rank_pool(2)(_sum_bad, str(tmp_path), 0.5)] == [(2, 1), (2, 1)]
    for _, _, message in rank_pool(2)(_sum_bad, str(tmp_path), 1 / 8):
        assert "2 of 8 clips cannot be used" in message
        assert all(f"{path.name} (unreadable" in message for path in bad)

"""Batches over ranks and workers: same order, nothing twice, nothing lost; workers that die or hang."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import time

import pytest
import torch

from sat_train.config.shapes import ClipShape
from sat_train.data.batches import DataPosition, OrderedBatches, VideoSample
from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.dataset import VideoDataset
from sat_train.data.failure_log import ClipFailure, FailureLog
from sat_train.data.loader import VideoLoader
from sat_train.data.sampler import AugmentationKey, GlobalOrder
from sat_train.errors import DataError
from tests.unit.data.videos import SIDE, dataset_of, make_folder, record_of


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Twelve clips of ten frames."""
    root = make_folder(tmp_path_factory.mktemp("set"), [f"{i:02d}" for i in range(12)], num_frames=10)
    return [record_of(path) for path in sorted((root / "videos").iterdir())]


def make_dataset(records, kind=VideoDataset, **options):
    shape = ClipShape(options.pop("max_num_frames", 1), SIDE, SIDE)
    return dataset_of(records, shape=shape, kind=kind, **{"seed": 5, **options})


def make_loader(
    dataset, *, start=0, batch_size=2, rank=0, size=1, stop=None, path=None, allowed=0.0, **options
):
    log = FailureLog(num_clips=len(dataset.sources[0]), max_bad_fraction=allowed, path=path)
    batches = OrderedBatches([batch_size], rank=rank, num_ranks=size, start=DataPosition(start), stop=stop)
    return VideoLoader(dataset=dataset, batches=batches, failures=log, **options)


def take(loader, count):
    batches = [next(loader) for _ in range(count)]
    loader.close()
    return batches


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_an_epoch_is_each_sample_once_at_any_number_of_ranks_and_workers(clips, size, workers):
    per_rank = 12 // size
    batch_size = {1: 4, 2: 3, 3: 2, 4: 1}[size]
    taken = {}
    for rank in range(size):
        loader = make_loader(
            make_dataset(clips), batch_size=batch_size, rank=rank, size=size, num_workers=workers
        )
        for batch in take(loader, per_rank // batch_size):
            taken.update(zip(batch.sample_indices, batch.clip_ids, strict=True))
    assert sorted(taken) == list(range(12))
    order = GlobalOrder(seed=5, clip_weights=[[1.0] * 12])
    assert [taken[i] for i in range(12)] == [f"{order.clip_ref(i).clip:02d}.mp4" for i in range(12)]
    assert len(set(taken.values())) == 12


def test_samples_do_not_depend_on_workers_or_ranks(clips):
    one = take(make_loader(make_dataset(clips), batch_size=4), 2)
    two = take(make_loader(make_dataset(clips), batch_size=2, rank=1, size=2, num_workers=2), 2)
    assert two[0].sample_indices == (2, 3)
    for whole, part in zip(one, two, strict=True):
        for ours, theirs in zip(whole.samples[2:], part.samples, strict=True):
            assert torch.equal(ours.video_tchw, theirs.video_tchw)


@pytest.mark.parametrize("stopped_at", [4, 8, 20])
def test_a_run_resumes_anywhere_with_another_number_of_ranks(clips, stopped_at):
    whole = [i for b in take(make_loader(make_dataset(clips), batch_size=4), 8) for i in b.clip_ids]
    before = make_loader(make_dataset(clips), batch_size=4)
    done = take(before, stopped_at // 4)
    assert before.upcoming() == tuple(range(stopped_at, stopped_at + 4))
    assert before.position == DataPosition(stopped_at)
    ranks = [
        make_loader(make_dataset(clips), start=stopped_at, batch_size=2, rank=r, size=2) for r in range(2)
    ]
    after = [clip for _ in range(2) for rank in ranks for clip in next(rank).clip_ids]
    assert [clip for batch in done for clip in batch.clip_ids] + after == whole[: stopped_at + 8]


def test_a_finite_loader_starts_over(clips):
    loader = make_loader(make_dataset(clips), batch_size=2, size=2, rank=1, stop=10, num_workers=1)
    for _ in range(2):
        seen = [(loader.upcoming(), batch.sample_indices) for batch in loader]
        assert seen == [((6, 7), (2, 3)), ((9,), (6, 7)), ((), (9,))]
    assert len(loader) == 3
    assert loader.num_samples == 10


def test_a_closed_loader_continues_at_its_position(clips):
    loader = make_loader(make_dataset(clips), num_workers=1)
    assert next(loader).sample_indices == (0, 1)
    loader.close()
    assert next(loader).sample_indices == (2, 3)
    loader.close()


def test_the_model_s_random_numbers_are_left_alone(clips):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(make_loader(make_dataset(clips), num_workers=1), 2)
    take(make_loader(make_dataset(clips)), 2)
    assert torch.equal(before, torch.get_rng_state())


def bad_clip(tmp_path, name="bad.mp4"):
    (tmp_path / name).write_bytes(b"no video at all" * 99)
    return record_of(tmp_path / name)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_clips_are_counted_written_down_and_replaced(clips, tmp_path, workers, caplog):
    records = [*clips[:5], bad_clip(tmp_path)]
    log_path = tmp_path / "run" / "quarantine.jsonl"
    loader = make_loader(make_dataset(records), allowed=0.2, path=log_path, num_workers=workers)
    batches = take(loader, 6)  # two epochs: the clip fails twice and is written down once
    assert "bad.mp4" not in {clip for batch in batches for clip in batch.clip_ids}
    assert [i for batch in batches for i in batch.sample_indices] == list(range(12))
    assert [failure.cause for failure in loader.failures.by_clip.values()] == ["unreadable"]
    lines = [json.loads(line) for line in log_path.read_text().splitlines()]
    assert [(line["clip_id"], line["cause"], line["rank"]) for line in lines] == [
        ("bad.mp4", "unreadable", 0)
    ]
    assert "bad.mp4 cannot be used (unreadable: Invalid data" in caplog.text


def test_too_many_bad_clips_end_the_run(clips, tmp_path):
    records = [*clips[:3], bad_clip(tmp_path), bad_clip(tmp_path, "worse.mp4")]
    loader = make_loader(make_dataset(records), allowed=0.3, num_workers=1)
    with pytest.raises(DataError, match=r"2 of 5 clips cannot be used:\n.*(bad|worse).mp4 \(unreadable"):
        take(loader, 10)
    loader.close()


def test_an_error_in_a_worker_ends_the_run_in_its_own_words(clips):
    """A clip that turns out too short ends no run; a set of nothing else does."""
    loader = make_loader(make_dataset(clips, max_num_frames=9), num_workers=1)
    with pytest.raises(DataError, match=r"^sample \d: none of 12 clips can be used:\n.*gives 3 of 9 frames"):
        next(loader)


class Deadly(VideoDataset):
    """Meets a clip that kills or stops whoever decodes it."""

    def sample(self, index, ref):
        if self.record(ref).clip_id == "07.mp4":
            if self.spec.skip_frms_num == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return super().sample(index, ref)


@pytest.mark.parametrize(("how", "cause"), [(1, "worker died"), (0, "timeout")])
def test_a_clip_that_kills_or_stops_its_worker_is_named_and_replaced(clips, how, cause):
    dataset = make_dataset(clips, Deadly, skip_frms_num=how)
    loader = make_loader(dataset, allowed=0.1, num_workers=2, worker_timeout_s=2)
    batches = take(loader, 6)
    assert [i for batch in batches for i in batch.sample_indices] == list(range(12))
    assert "07.mp4" not in {clip for batch in batches for clip in batch.clip_ids}
    assert {clip: f.cause for clip, f in loader.failures.by_clip.items()} == {"07.mp4": cause}


def test_where_ranks_share_samples_a_lost_worker_ends_the_run(clips):
    dataset = make_dataset(clips, Deadly, skip_frms_num=1)
    loader = make_loader(dataset, allowed=0.1, num_workers=1, replaces_lost=False)
    with pytest.raises(DataError, match=r"07.mp4 cannot be used \(worker died"):
        take(loader, 6)


def test_workers_leave_with_the_loader(clips):
    others = set(multiprocessing.active_children())  # of other tests, such as living ranks
    loader = make_loader(make_dataset(clips), num_workers=2)
    next(loader)
    assert len(set(multiprocessing.active_children()) - others) == 2
    del loader
    assert not set(multiprocessing.active_children()) - others


def sample(index, *, image=None, size=4):
    video = torch.full((2, 3, size, size), index, dtype=torch.uint8)
    return VideoSample(f"clip {index}", index, 2, video, f"caption {index}", image, AugmentationKey(1, index))


def test_batches_hold_their_samples_in_order():
    batch = VideoDataset.collate([sample(3), sample(9)])
    assert [int(each.video_tchw[0, 0, 0, 0]) for each in batch.samples] == [3, 9]
    assert (batch.clip_ids, batch.sample_indices) == (("clip 3", "clip 9"), (3, 9))
    with pytest.raises(AssertionError, match="one shape"):
        VideoDataset.collate([sample(3), sample(9, size=8)])


def test_first_frames_stand_in_for_missing_images():
    image = torch.full((3, 4, 4), 77, dtype=torch.uint8)
    samples = [sample(3), sample(9, image=image)]
    assert [int(each.conditioning_image_chw()[0, 0, 0]) for each in samples] == [3, 77]


def test_a_bad_clip_can_be_sent_to_other_ranks():
    copy = pickle.loads(pickle.dumps(BadClip("unreadable", "no answer", may_pass=True)))
    assert (str(copy), copy.cause, copy.may_pass) == ("unreadable: no answer", "unreadable", True)


def test_the_limit_is_of_the_whole_set():
    log = FailureLog(num_clips=200, max_bad_fraction=0.01)
    for i in range(2):
        log.add(ClipFailure(i, f"{i}.mp4", "damaged", "x"))
    log.check()
    with pytest.raises(DataError, match="3 of 200 clips cannot be used"):
        log.check({str(i): ClipFailure(i, str(i), "damaged", "x") for i in range(3)})

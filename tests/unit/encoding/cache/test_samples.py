"""The data set with a cache gives what it gives without one, and says what it lacks."""

from __future__ import annotations

import pytest
import torch

from sat_train.data.batches import OrderedBatches
from sat_train.data.dataset import VideoDataset
from sat_train.data.failure_log import FailureLog
from sat_train.data.loader import VideoLoader
from sat_train.encoding.cache.shards import EntryInfo, ShardWriter
from sat_train.encoding.encoded_batch import EncodedBatch, EncodedSample
from sat_train.encoding.encoded_dataset import UnencodedSample, drop_repeated, find_missing
from sat_train.errors import DataError
from tests.unit.data.videos import record_of, write_numbered
from tests.unit.encoding.cache.samples import keep, open_dataset, read, tensors_of


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name in "abcd":
        write_numbered(folder / f"{name}.mp4", num_frames=30, gop=5 + ord(name) % 7)
    return [record_of(folder / f"{name}.mp4") for name in "abcd"]


def fill(folder, records, indices, **options):
    dataset, writer = open_dataset(folder, records, use="write", **options), ShardWriter(folder)
    for index in indices:
        keep(writer, read(dataset, index).sample, index)
    writer.publish()


@pytest.mark.parametrize("image", [None, "noised"])
def test_samples_come_from_the_cache(tmp_path, records, image):
    fill(tmp_path, records, range(4), image=image)
    dataset = open_dataset(tmp_path, records, use="require", image=image)
    for index in range(4):
        encodings, made = read(dataset, index).sample.encodings, tensors_of(index)
        assert encodings.keys() == ({"clip", "text"} if image is None else made.keys())
        for name in encodings.keys() - {"text"}:  # all have one caption
            for part, tensor in encodings[name].items():
                assert torch.equal(tensor, made[name][part])


def test_identical_captions_are_one_entry(tmp_path, records):
    fill(tmp_path, records, range(4))
    index = open_dataset(tmp_path, records).cache.index
    assert len(index) == 4 + 1


def test_what_is_missing_is_decoded_or_refused(tmp_path, records):
    fill(tmp_path, records, [0])
    assert isinstance(read(open_dataset(tmp_path, records, use="read"), 1).sample, UnencodedSample)
    with pytest.raises(DataError, match=r"b.mp4: clip not in the cache[\s\S]*launch/precompute.py"):
        read(open_dataset(tmp_path, records, use="require"), 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_decodes_only_the_samples_that_the_cache_lacks(tmp_path, records, num_workers):
    fill(tmp_path, records, [0, 1, 2])
    dataset = open_dataset(tmp_path, records)
    loader = VideoLoader(
        dataset=dataset.videos,
        reader=dataset,
        batches=OrderedBatches([2], stop=4),
        failures=FailureLog(num_clips=4, max_bad_fraction=0.0),
        num_workers=num_workers,
        prefetch_factor=2,
        pin_memory=False,
        worker_timeout_s=60,
        replaces_lost=True,
        fingerprint="",
    )
    first, second = loader
    assert isinstance(first, EncodedBatch)
    assert [float(mean.mean()) for mean in first.encodings["clip"]["mean"]] == [0.0, 1.0]
    assert [type(sample) for sample in second.samples] == [EncodedSample, UnencodedSample]
    assert second.samples[1].entries == dataset.entries(3, dataset.videos.order.clip_ref(3))


def test_a_clip_known_to_be_undecodable_is_replaced_as_without_a_cache(tmp_path, records):
    clip = read(open_dataset(tmp_path, records, use="write"), 1).sample.entries["clip"]
    writer = ShardWriter(tmp_path)
    writer.add(clip.key, {}, EntryInfo("failed", "b.mp4", "", clip.info.origin, ("damaged", "at 1 s")))
    writer.publish()
    fill(tmp_path, records, [0, 2, 3])
    result = read(open_dataset(tmp_path, records, use="require"), 1)
    assert (result.failures[0].clip_id, result.failures[0].cause) == ("b.mp4", "damaged")
    assert result.sample.clip_id != "b.mp4"
    dataset = open_dataset(tmp_path, records)
    assert find_missing(dataset, range(4)) == []
    assert [m.clip_id for m in find_missing(dataset, range(4), retry_failed=True)] == ["b.mp4"]


def test_the_plan_names_what_is_missing_once(tmp_path, records):
    fill(tmp_path, records, [0, 1])
    dataset = open_dataset(tmp_path, records)
    missing = find_missing(dataset, range(8))
    assert [m.index for m in missing] == [2, 3, 6, 7]
    assert [m.index for m in drop_repeated(missing)] == [2, 3]
    assert [m.clip_id for m in missing[:2]] == ["c.mp4", "d.mp4"]


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, records, monkeypatch):
    path = tmp_path / "clip.mp4"
    write_numbered(path, num_frames=30)
    dataset = open_dataset(tmp_path, [record_of(path), records[0]], use="write")
    decode = VideoDataset.sample

    def decode_and_edit(self, index, ref):
        sample = decode(self, index, ref)
        if ref.clip == 0:
            write_numbered(path, num_frames=31)
        return sample

    monkeypatch.setattr(VideoDataset, "sample", decode_and_edit)
    result = read(dataset, 0)
    assert result.failures[0].cause == "changed"
    assert result.sample.clip_id == "a.mp4"

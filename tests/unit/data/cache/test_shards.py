"""Entries on disk: complete or absent, found by whoever looks, read as they were written."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time

import pytest
import torch

from sat_train.data.cache.index import CacheIndex
from sat_train.data.cache.prune import verify_entries
from sat_train.data.cache.shards import FOLDER, About, ShardWriter
from sat_train.errors import DataError
from tests.unit.data.cache.samples import tensors_of

ABOUT = About("clip", "a clip", "vae")


def write(folder, numbers, **options):
    writer = ShardWriter(folder, **options)
    for number in numbers:
        writer.add(f"key {number}", tensors_of(number)["clip"], ABOUT)
    writer.publish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_has_the_bits_that_were_written(tmp_path, dtype):
    tensors = {"mean": torch.randn(3, 5, 7).to(dtype), "logvar": torch.randn(1, 1).to(dtype)}
    writer = ShardWriter(tmp_path)
    writer.add("key", tensors, ABOUT)
    writer.add("text", {"text": torch.randn(2, 3)[:, 1:]}, ABOUT)
    writer.publish()
    read = CacheIndex(tmp_path).read("key")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert {tensor.dtype for tensor in read.values()} == {dtype}
    assert CacheIndex(tmp_path).read("another key") is None


def test_a_shard_is_published_when_it_is_full_and_when_it_is_old(tmp_path):
    write(tmp_path / "size", range(10), shard_bytes=2 * 768)
    assert len(list((tmp_path / "size" / FOLDER).iterdir())) == 5
    write(tmp_path / "time", range(10), interval_s=0)
    assert len(list((tmp_path / "time" / FOLDER).iterdir())) == 10
    assert verify_entries(tmp_path / "time") == (10, [])


def test_shards_that_appear_later_are_found(tmp_path):
    index = CacheIndex(tmp_path)
    assert "key 1" not in index
    write(tmp_path, [1])
    assert "key 1" in index
    write(tmp_path, [2])
    assert float(pickle.loads(pickle.dumps(index)).read("key 2")["mean"].mean()) == 2


def test_many_files_stay_open_only_so_far(tmp_path):
    write(tmp_path, range(80), interval_s=0)
    index = CacheIndex(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert [float(index.read(f"key {i}")["mean"].mean()) for i in range(80)] == list(range(80))
    assert len(os.listdir("/proc/self/fd")) - before <= 64


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_torn_shard_is_left_out_and_named(tmp_path, caplog, kept):
    """No write of ours leaves one; a disk may."""
    write(tmp_path, [1])
    write(tmp_path, [2])
    path = sorted((tmp_path / FOLDER).iterdir())[0]
    path.write_bytes(path.read_bytes()[:kept])
    index = CacheIndex(tmp_path)
    assert ("key 1" in index, "key 2" in index) == (False, True)
    assert verify_entries(tmp_path)[1][0].startswith(path.name)


def test_a_shard_that_has_gone_is_named(tmp_path):
    write(tmp_path, [1])
    index = CacheIndex(tmp_path)
    (path,) = (tmp_path / FOLDER).iterdir()
    path.unlink()
    with pytest.raises(DataError, match=path.name):
        index.read("key 1")


def test_a_full_disk_is_named_and_what_was_published_is_kept(tmp_path, monkeypatch):
    write(tmp_path, [1])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sat_train.data.cache.shards.write_file", fail)
    with pytest.raises(DataError, match=r"No space left on device[\s\S]*make room"):
        write(tmp_path, [2])
    assert "key 1" in CacheIndex(tmp_path)


def test_known_failures_are_told_and_a_later_success_wins(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add("key 1", {}, About("failed", "a clip", "", None, ("damaged", "at 3 s")))
    writer.publish()
    index = CacheIndex(tmp_path)
    assert ("key 1" in index, index.failure("key 1")) == (False, ("damaged", "at 3 s"))
    write(tmp_path, [1])
    assert ("key 1" in index, index.failure("key 1")) == (True, None)


def _write_slowly(folder: str, first: int) -> None:
    from pathlib import Path

    writer = ShardWriter(Path(folder), rank=first, shard_bytes=3000)
    for number in range(first, 100_000, 2):
        if f"key {number}" not in CacheIndex(Path(folder)):
            writer.add(f"key {number}", tensors_of(number)["clip"], ABOUT)


def test_two_writers_killed_at_any_moment_leave_whole_entries_only(tmp_path):
    context = multiprocessing.get_context("fork")
    published = 0
    for turn in range(6):
        writers = [context.Process(target=_write_slowly, args=(str(tmp_path), first)) for first in (0, 1)]
        for writer in writers:
            writer.start()
        time.sleep(0.05 + 0.037 * turn)
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        if not (tmp_path / FOLDER).exists():
            continue
        whole, faults = verify_entries(tmp_path)
        assert not faults
        assert whole >= published, "what was published stays"
        published = whole
    index = CacheIndex(tmp_path)
    assert len(index) == published > 0, "nothing is encoded twice that was published"
    for number in range(100):
        read = index.read(f"key {number}")
        assert read is None or torch.equal(read["mean"], tensors_of(number)["clip"]["mean"])

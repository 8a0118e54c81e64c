"""Entries on disk: complete or absent, found by whoever looks, read as they were written."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch

from sat_train.encoding.cache.index import CacheIndex
from sat_train.encoding.cache.prune import verify_entries
from sat_train.encoding.cache.shards import DTYPES, FOLDER, EntryInfo, ShardWriter, read_header
from sat_train.encoding.cache.write_behind import WriteBehind
from sat_train.errors import DataError
from tests.unit.encoding.cache.samples import tensors_of

ABOUT = EntryInfo("clip", "a clip", "vae")


def write(folder, numbers, **options):
    writer = ShardWriter(folder, **options)
    for number in numbers:
        writer.add(f"key {number}", tensors_of(number)["clip"], ABOUT)
    writer.publish()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_what_is_read_has_the_bits_that_were_written(tmp_path, dtype):
    tensors = {"mean": (40 * torch.rand(3, 5, 7)).to(dtype), "logvar": torch.ones(()).to(dtype)}
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


def test_a_thread_publishes_the_bytes_that_the_caller_would(tmp_path):
    """It copies a tensor before it returns, so that a change afterwards is not written."""
    write(tmp_path / "here", [*range(9), 8], shard_bytes=2 * 768)
    behind = WriteBehind(ShardWriter(tmp_path / "behind", shard_bytes=2 * 768))
    for number in [*range(9), 8]:
        tensors = tensors_of(number)["clip"]
        behind.add(f"key {number}", tensors, ABOUT)
        for tensor in tensors.values():
            tensor.fill_(-1)
    behind.publish()
    here, there = (
        [read_header(path) for path in sorted((tmp_path / name / FOLDER).iterdir())]
        for name in ("here", "behind")
    )
    assert here == there, "entries with their hashes, places and order"
    assert verify_entries(tmp_path / "behind") == (9, [])


def test_the_next_call_raises_what_the_thread_could_not_write(tmp_path):
    (tmp_path / FOLDER).write_text("in the way")
    writer = WriteBehind(ShardWriter(tmp_path, shard_bytes=1))

    def add_many():
        for number in range(10):
            writer.add(f"key {number}", tensors_of(number)["clip"], ABOUT)

    with pytest.raises(DataError, match=r"data.cache_dir = [\s\S]*free some space"):
        add_many()
    with pytest.raises(DataError, match="shards published before remain"):
        writer.publish()


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


def test_a_shard_that_has_gone_is_named_and_its_entries_are_missing(tmp_path, caplog):
    write(tmp_path, [1])
    index = CacheIndex(tmp_path)
    (path,) = (tmp_path / FOLDER).iterdir()
    path.unlink()
    assert index.read("key 1") is None
    assert path.name in caplog.text
    assert "key 1" not in index


def damage(folder, shard=0):
    """Flips one bit of the last tensor of a shard."""
    path = sorted((folder / FOLDER).iterdir())[shard]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path


def test_a_damaged_entry_is_never_read_and_said_once(tmp_path, caplog):
    write(tmp_path, [1])
    path, index = damage(tmp_path), CacheIndex(tmp_path)
    assert "key 1" in index, "the header is whole"
    assert not index.is_whole("key 1")
    assert (index.read("key 1"), index.read("key 1")) == (None, None)
    assert "key 1" not in index
    said = f"{path}: the clip of a clip: contents changed (SHA-256 differs)"
    assert index.fault("key 1") == said
    assert caplog.text.count(said) == 1
    write(tmp_path, [1])
    assert torch.equal(index.read("key 1")["mean"], tensors_of(1)["clip"]["mean"]), (
        "written again, it is there"
    )


def test_where_one_of_two_entries_of_a_key_is_damaged_the_other_is_read(tmp_path):
    write(tmp_path, [1])
    write(tmp_path, [1])
    for shard in (0, 1):
        path = sorted((tmp_path / FOLDER).iterdir())[shard]
        before = path.read_bytes()
        damage(tmp_path, shard)
        assert torch.equal(CacheIndex(tmp_path).read("key 1")["mean"], tensors_of(1)["clip"]["mean"])
        path.write_bytes(before)


def test_an_entry_that_is_not_finite_is_neither_kept_nor_read(tmp_path, caplog, monkeypatch):
    broken = {"mean": torch.tensor([1.0, float("nan")]), "logvar": torch.zeros(2)}
    writer = ShardWriter(tmp_path)
    writer.add("key", broken, ABOUT)
    writer.publish()
    assert "a clip: the encoded clip is not finite" in caplog.text
    assert "key" not in CacheIndex(tmp_path)
    monkeypatch.setattr(
        "sat_train.encoding.cache.shards.are_finite", lambda tensors: True
    )  # as others may write
    writer.add("key", broken, ABOUT)
    writer.publish()
    monkeypatch.undo()
    index = CacheIndex(tmp_path)
    assert index.read("key") is None
    assert "the clip of a clip: holds values that are not finite" in index.fault("key")


def test_the_entry_that_was_there_first_wins_whatever_the_names_are(tmp_path):
    write(tmp_path, [1])
    (first,) = (tmp_path / FOLDER).iterdir()
    late = ShardWriter(tmp_path / "late")
    late.add("key 1", tensors_of(2)["clip"], ABOUT)
    late.publish()
    (shard,) = (tmp_path / "late" / FOLDER).iterdir()
    shard.rename(first.with_name(f"0{'0' * 19}.safetensors"))
    assert float(CacheIndex(tmp_path).read("key 1")["mean"].mean()) == 1


def test_a_disk_without_room_ends_no_training_and_loses_nothing(tmp_path, caplog):
    """A file where the folder should be stands for the disk; then there is room again."""
    (tmp_path / FOLDER).write_text("in the way")
    writer = ShardWriter(tmp_path, shard_bytes=768, waits=True)
    for number in range(3):
        writer.add(f"key {number}", tensors_of(number)["clip"], ABOUT)
    assert caplog.text.count("training continues, and encoded samples wait in memory") == 1
    assert all(f"key {number}" in writer for number in range(3))
    (tmp_path / FOLDER).unlink()
    writer.publish_or_warn()
    assert verify_entries(tmp_path) == (3, [])
    for number in range(3, 40):
        writer.add(f"key {number}", tensors_of(number)["clip"], ABOUT)
    assert verify_entries(tmp_path) == (40, [])


def test_what_waits_for_a_disk_without_room_does_not_fill_the_memory(tmp_path, caplog):
    (tmp_path / FOLDER).write_text("in the way")
    writer = ShardWriter(tmp_path, shard_bytes=768, waits=True)
    for number in range(100):
        writer.add(f"key {number}", tensors_of(number)["clip"], ABOUT)
    kept = sum(f"key {number}" in writer for number in range(100))
    assert kept == 5
    writer.publish_or_warn()
    assert f"{kept} encodings are lost and will be computed again by the next run" in caplog.text


def test_a_full_disk_is_named_and_what_was_published_is_kept(tmp_path, monkeypatch):
    write(tmp_path, [1])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sat_train.encoding.cache.shards.write_file", fail)
    with pytest.raises(DataError, match=r"No space left on device[\s\S]*free some space"):
        write(tmp_path, [2])
    assert "key 1" in CacheIndex(tmp_path)


@pytest.mark.parametrize("kind", ["a file in its place", "a folder that cannot be made"])
def test_a_folder_that_takes_nothing_is_known_before_the_first_entry(tmp_path, kind):
    writer = WriteBehind(ShardWriter(tmp_path / "cache"))
    writer.check_folder()
    assert not any((tmp_path / "cache" / FOLDER).iterdir()), "it leaves nothing"
    assert not CacheIndex(tmp_path / "cache")

    (tmp_path / "taken").write_text("")
    place = tmp_path / "taken" if kind == "a file in its place" else Path("/proc/cache")
    with pytest.raises(DataError, match=rf"data.cache_dir = {place}: .*\n.*a folder with room"):
        WriteBehind(ShardWriter(place)).check_folder()


def test_known_failures_are_reported_and_a_later_success_wins(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add("key 1", {}, EntryInfo("failed", "a clip", "", None, ("damaged", "at 3 s")))
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

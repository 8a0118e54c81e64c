"""What is stale is listed with its reason and goes; everything else stays as it was."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from sat_train.cli.main import main
from sat_train.data.clips.clip_file import Span
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.index import CacheIndex
from sat_train.encoding.cache.key import CODE_VERSION, EncoderDigests, Origin
from sat_train.encoding.cache.prune import Staleness, list_entries, prune_entries, verify_entries
from sat_train.encoding.cache.shards import FOLDER, EntryInfo, ShardWriter, read_header
from sat_train.errors import DataError
from tests.unit.encoding.cache.samples import tensors_of


@pytest.fixture
def cache(tmp_path):
    """One shard: two good entries, and one of each stale kind."""
    folder, writer = tmp_path / "cache", ShardWriter(tmp_path / "cache")
    origins = {}
    for name in ("good", "edited", "gone", "moved"):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(name.encode())
        status = path.stat()
        sha256 = FileMetadata(folder).sha256(path)
        origins[name] = Origin(str(path), status.st_size, status.st_mtime_ns, sha256)
        writer.add(name, tensors_of(1)["clip"], EntryInfo("clip", name, "vae", origins[name]))
    writer.add("old", tensors_of(2)["clip"], EntryInfo("clip", "old", "vae", code_version=CODE_VERSION - 1))
    writer.add("failed", {}, EntryInfo("failed", "failed", "", origins["good"], ("damaged", "x")))
    writer.add("text", tensors_of(3)["text"], EntryInfo("text", "a caption", "t5"))
    writer.publish()
    again = ShardWriter(folder)
    again.add("good", tensors_of(1)["clip"], EntryInfo("clip", "good", "vae", origins["good"]))
    again.publish()
    (tmp_path / "edited.mp4").write_bytes(b"edited since")
    (tmp_path / "gone.mp4").unlink()
    os.utime(tmp_path / "good.mp4", ns=(5, 5))  # touched, not changed
    (folder / FOLDER / "broken.safetensors.part").write_bytes(b"left by a kill")
    return folder


def reasons(folder, **options):
    lines, damaged = list_entries(folder, Staleness(FileMetadata(folder), **options))
    assert not damaged
    return {reason: count for line in lines for reason, count in line.stale}


def test_each_stale_entry_has_its_reason(cache):
    always = {"file changed": 1, "older code": 1, "repeated": 1}
    assert reasons(cache) == always
    assert reasons(cache, drop_gone=True, drop_failed=True) == {**always, "file gone": 1, "failed": 1}
    other = reasons(cache, encoder_digests=EncoderDigests("another vae", "t5"))
    assert other == {"older code": 1, "repeated": 1, "other encoder": 4}


def test_stale_entries_go_and_the_others_keep_their_bits(cache):
    removed, size = prune_entries(cache, Staleness(FileMetadata(cache)))
    assert removed == 3
    assert size > 0
    index = CacheIndex(cache)
    assert {key for key in ("good", "gone", "moved", "text", "edited", "old") if key in index} == {
        *("good", "gone", "moved", "text")
    }
    assert torch.equal(index.read("good")["mean"], tensors_of(1)["clip"]["mean"])
    assert index.failure("failed") == ("damaged", "x")
    assert verify_entries(cache)[1] == []
    assert not list((cache / FOLDER).glob("*.part"))
    assert prune_entries(cache, Staleness(FileMetadata(cache)))[0] == 0


def test_damage_is_found_by_verify_and_removed_by_prune(cache, capsys):
    path = sorted((cache / FOLDER).glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(["cache", "verify", "--cache-dir", str(cache)]) == 1
    assert "good: contents changed" in capsys.readouterr().out
    path.write_bytes(data[:50])
    assert main(["cache", "list", "--cache-dir", str(cache)]) == 0
    assert path.name in capsys.readouterr().out
    assert main(["cache", "prune", "--cache-dir", str(cache)]) == 0
    assert not path.exists()
    assert main(["cache", "verify", "--cache-dir", str(cache)]) == 0


def test_a_damaged_entry_goes_with_a_flag_and_never_gets_a_new_hash(cache, capsys):
    first, _ = sorted((cache / FOLDER).glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    slot = read_header(first).slots["text"]["text"]
    data[slot.offset] ^= 1
    whole = read_header(first).slots["good"]["mean"]
    data[whole.offset] ^= 1  # the entry that comes first of the two that are there
    first.write_bytes(data)
    assert main(["cache", "prune", "--cache-dir", str(cache)]) == 0
    index = CacheIndex(cache)
    assert torch.equal(index.read("good")["mean"], tensors_of(1)["clip"]["mean"]), "the whole one is kept"
    assert "text" not in index, "it was rewritten beside stale ones, and read for that"
    assert verify_entries(cache)[1] == []
    (path,) = [path for path in (cache / FOLDER).iterdir() if "moved" in read_header(path).entries]
    data = bytearray(path.read_bytes())
    data[read_header(path).slots["moved"]["mean"].offset] ^= 1
    path.write_bytes(data)
    assert main(["cache", "prune", "--cache-dir", str(cache)]) == 0
    assert "moved: contents changed" in "".join(verify_entries(cache)[1])
    assert main(["cache", "prune", "--damaged", "--cache-dir", str(cache)]) == 0
    assert verify_entries(cache)[1] == []
    assert "moved" not in CacheIndex(cache)


def test_a_folder_without_a_cache_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no cache in this folder"):
        list_entries(tmp_path, Staleness(FileMetadata(tmp_path)))
    assert main(["cache", "list", "--cache-dir", str(tmp_path)]) == 2


def test_a_moved_file_keeps_its_entry(cache, tmp_path):
    shutil.move(tmp_path / "moved.mp4", tmp_path / "elsewhere.mp4")
    prune_entries(cache, Staleness(FileMetadata(cache)))
    assert "moved" in CacheIndex(cache)


def test_an_archive_that_grew_or_was_touched_keeps_the_entries_of_its_clips(tmp_path):
    path, folder = tmp_path / "a.tar", tmp_path / "cache"
    path.write_bytes(b"headONEtailTWO")
    file_metadata, writer = FileMetadata(folder), ShardWriter(folder)
    for name, offset in (("one", 4), ("two", 11)):
        info = EntryInfo("clip", name, "vae", file_metadata.origin(path, Span(offset, 3)))
        writer.add(name, tensors_of(1)["clip"], info)
    writer.publish()
    path.write_bytes(b"headONEtailtwo and more")
    assert reasons(folder) == {"file changed": 1}
    assert prune_entries(folder, Staleness(FileMetadata(folder)))[0] == 1
    assert "one" in CacheIndex(folder)

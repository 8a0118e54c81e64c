"""A stranger's cache: looked at without a request, a hang or a traceback, and left out with its name."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sat_train.cli.main import main
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.index import CacheIndex
from sat_train.encoding.cache.shards import FOLDER, EntryInfo, Origin, ShardWriter
from sat_train.errors import SatTrainError
from tests.unit.encoding.cache.samples import tensors_of

Case = Callable[[Path], None]


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Changes the header of a shard and its entries, and leaves its tensors."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    entries = json.loads(header["__metadata__"]["entries"])
    change(header, entries)
    header["__metadata__"]["entries"] = json.dumps(entries)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def of_entry(field: str, value: Any) -> Case:
    def change(header: dict[str, Any], entries: dict[str, Any]) -> None:
        entries["clip"][field] = value

    return lambda shard: rewrite(shard, change)


def of_origin(field: str, value: Any) -> Case:
    def change(header: dict[str, Any], entries: dict[str, Any]) -> None:
        entries["clip"]["origin"][field] = value

    return lambda shard: rewrite(shard, change)


def of_tensor(field: str, value: Any) -> Case:
    def change(header: dict[str, Any], entries: dict[str, Any]) -> None:
        header["clip/mean"][field] = value

    return lambda shard: rewrite(shard, change)


def raw(data: bytes) -> Case:
    return lambda shard: shard.write_bytes(data)


def framed(text: bytes) -> Case:
    return raw(struct.pack("<Q", len(text)) + text)


def fifo(shard: Path) -> None:
    shard.unlink()
    os.mkfifo(shard)


def folder(shard: Path) -> None:
    shard.unlink()
    shard.mkdir()


def sparse(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.write(struct.pack("<Q", 20_000_000_000))
        file.truncate(30_000_000_000)


def of_book(text: bytes) -> Case:
    return lambda shard: (shard.parent.parent / "files" / "0.json").write_bytes(text) and None


def book_fifo(shard: Path) -> None:
    os.mkfifo(shard.parent.parent / "files" / "1.json")


ODD = (None, True, -1, 1 << 70, 1.5, "x\x1b[31m", [], {}, [[]], float("inf"))
KNOWN = {"stamp": [1, 2, 3, 4], "sha256": "ab", "info": None}
INFO = {"height": 8, "width": 8, "rate": 8.0, "first": 0.0, "last": 1.0, "codec": "h264", "is_image": False}
CASES: dict[str, Case] = {
    **{f"{field} {value!r}": of_entry(field, value) for field in ("kind", "name", "detail") for value in ODD},
    **{f"{field} {value!r}": of_entry(field, value) for field in ("sha256", "origin") for value in ODD},
    **{f"origin {f} {v!r}": of_origin(f, v) for f in ("path", "size", "mtime_ns", "part") for v in ODD},
    **{f"tensor {f} {v!r}": of_tensor(f, v) for f in ("shape", "dtype", "data_offsets") for v in ODD},
    "offsets behind the end": of_tensor("data_offsets", [0, 1 << 40]),
    "offsets backwards": of_tensor("data_offsets", [384, 0]),
    "a huge shape": of_tensor("shape", [1 << 40, 1 << 40]),
    "an extra field": of_entry("evil", 1),
    "remote": of_origin("path", "http://127.0.0.1:9/steal"),
    "any protocol": of_origin("path", "simplecache::http://127.0.0.1:9/steal"),
    "an unknown protocol": of_origin("path", "evil://x"),
    "a device": of_origin("path", "/dev/zero"),
    "a terminal": of_origin("path", "/dev/tty"),
    "a NUL": of_origin("path", "/tmp/a\0b"),
    "a lone surrogate": of_origin("path", "/tmp/\ud800"),
    "a name of 5000 letters": of_origin("path", "/" + "a" * 5000),
    "escapes in a name": of_entry("name", "\x1b]0;title\x07\x1b[2J"),
    "markup in an encoder": of_entry("encoder", "[/red][link=x]"),
    "escapes in an encoder": of_entry("encoder", "\x1b[2J"),
    "empty": raw(b""),
    "seven bytes": raw(b"1234567"),
    "no header": raw(b"\0" * 64),
    "a header behind the end": raw(struct.pack("<Q", 1 << 20) + b"{}"),
    "a header of 2**63": raw(struct.pack("<Q", 1 << 63) + b"{}"),
    "a list": framed(b"[]"),
    "a number": framed(b"1"),
    "a long number": framed(b'{"__metadata__": ' + b"1" * 5000 + b"}"),
    "nested": framed(b"[" * 100_000),
    "nested objects": framed(b'{"a":' * 100_000),
    "not UTF-8": framed(b'{"\xff": 1}'),
    "metadata of lists": framed(b'{"__metadata__": []}'),
    "entries nested": framed(
        json.dumps({"__metadata__": {"format": "sat_train cache 1", "entries": "[" * 100_000}}).encode()
    ),
    "entries a list": framed(
        json.dumps({"__metadata__": {"format": "sat_train cache 1", "entries": "[1]"}}).encode()
    ),
    "no entries": framed(json.dumps({"__metadata__": {"format": "sat_train cache 1"}}).encode()),
    "a FIFO": fifo,
    "a folder": folder,
    "a sparse header": sparse,
    "known: empty": of_book(b""),
    "known: nested": of_book(b"[" * 100_000),
    "known: a list": of_book(b"[]"),
    "known: a long number": of_book(b'{"files": {"a": ' + b"1" * 5000 + b'}, "names": {}}'),
    "known: not UTF-8": of_book(b"\xff\xfe"),
    "known: names a list": of_book(json.dumps({"files": {}, "names": []}).encode()),
    "known: name a list": of_book(json.dumps({"files": {}, "names": {"a": []}}).encode()),
    **{
        f"known: {field} {value!r}": of_book(
            json.dumps({"files": {"a": {**KNOWN, field: value}}, "names": {}}).encode()
        )
        for field, value in (("stamp", 1), ("stamp", ["a"]), ("sha256", 3), ("info", []), ("info", {"a": 1}))
    },
    **{
        f"known: {field} {value!r}": of_book(
            json.dumps({"files": {"a": {**KNOWN, "info": {**INFO, field: value}}}, "names": {}}).encode()
        )
        for field, value in (("height", "1"), ("rate", 0), ("rate", float("nan")), ("codec", []))
    },
    "known: a FIFO": book_fifo,
}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache of one shard, and of a later one that is whole."""
    root, clip = tmp_path / "cache", tmp_path / "clip.mp4"
    clip.write_bytes(b"a clip")
    origin = Origin(str(clip), clip.stat().st_size, clip.stat().st_mtime_ns, "sha")
    for key in ("clip", "whole"):
        writer = ShardWriter(root)
        writer.add(key, tensors_of(1)["clip"], EntryInfo("clip", key, "vae", origin))
        writer.publish()
    (root / "files").mkdir()
    return root


@pytest.fixture
def no_requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Counts what asks the network."""
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, where: asked.append(where))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: asked.append(where) or [])
    return asked


@pytest.mark.parametrize("case", CASES)
def test_a_strangers_cache_is_inspected_without_harm(
    cache: Path, no_requests, capfd, caplog, case: str
) -> None:
    CASES[case](sorted((cache / FOLDER).glob("*.safetensors"))[0])
    for words in (["list"], ["list", "--gone"], ["verify"], ["prune", "--gone"], ["prune", "--damaged"]):
        assert main(["cache", *words, "--cache-dir", str(cache)]) in (0, 1, 2)
    index = CacheIndex(cache)
    assert index.read("whole") is not None, "one bad shard spoils no other"
    index.read("clip")
    FileMetadata(cache)
    output = "".join(capfd.readouterr())
    assert "Traceback" not in output
    assert "\x1b" not in output
    assert no_requests == []


def test_headers_and_books_changed_at_random_are_read_or_left_out(cache: Path, capfd) -> None:
    rng = random.Random(4)
    shard = sorted((cache / FOLDER).glob("*.safetensors"))[0]
    file_metadata = FileMetadata(cache)
    file_metadata.remember("a", "b")
    file_metadata.publish()
    (known,) = (cache / "files").glob("*.json")
    whole, remembered = shard.read_bytes(), known.read_bytes()
    header = len(whole) - 2 * 384
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(header)] = rng.choice(b'0123456789[]{}",:\\abn\xff')
        shard.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        lines = bytearray(remembered)
        lines[rng.randrange(len(lines))] = rng.choice(b'09[]{}",:\xff')
        known.write_bytes(lines)
        try:
            index = CacheIndex(cache)
            FileMetadata(cache)
            read = index.read("clip")
        except SatTrainError:
            continue
        assert read is None or float(read["mean"].mean()) == 1, "what is read is what was written"
        assert index.read("whole") is not None

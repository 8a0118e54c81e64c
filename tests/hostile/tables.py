"""Hostile tables, archives and data sets."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from tests.hostile.case import Case, Field
from tests.hostile.clips import LEFT_OUT, PLACES, PLAYLISTS, data_case, good_clip, turn
from tests.unit.data.sources.test_archives import pack, save_dataset
from tests.unit.data.sources.test_hostile import (
    BROKEN_TABLES,
    HUGE,
    ODD_ROWS,
    STATES,
    pax,
    sparse,
    tar_header,
)


def cases() -> Iterator[Case]:
    """Gives all hostile tables; each kind meets each command in turn."""
    yield from _table_cases()
    yield from _archive_cases()
    yield from _dataset_cases()


_VIDEO_NAMES = (
    "http://127.0.0.1:{port}/a.mp4",
    "https://127.0.0.1:{port}/a.mp4",
    "tcp://127.0.0.1:{port}",
    "rtsp://127.0.0.1:{port}/a",
    "file:///etc/passwd",
    "concat:{secret}|{secret}",
    "subfile,,start,0,end,0,,:{secret}",
    "data:video/mp4;base64,AAAA",
    "crypto:{secret}",
    "cache:http://127.0.0.1:{port}/a.mp4",
    "pipe:0",
    "ftp://127.0.0.1:{port}/a.mp4",
    "s3://bucket/a.mp4",
    "-",
    "%d.png",
    "/dev/video0",
    "/dev/stdin",
    "{secret}",
    "../outside/secret.txt",
)


def _table_cases() -> Iterator[Case]:
    for number, (row, _) in enumerate(ODD_ROWS):

        def odd(field: Field, row: object = row) -> None:
            good = json.dumps({"video": "ok.mp4", "caption": "fine"}).encode()
            line = json.dumps({"video": "a.mp4", "caption": "x", **row}) if isinstance(row, dict) else row
            line = line if isinstance(line, bytes) else str(line).encode()
            (field.inside / "m.jsonl").write_bytes(good + b"\n" + line + b"\n")
            (field.inside / "ok.mp4").write_bytes(good_clip())

        yield data_case(f"odd row {number}", turn(number), odd, "m.jsonl")
    for number, (name, (content, _)) in enumerate(BROKEN_TABLES.items()):

        def broken(field: Field, name: str = name, content: bytes = content) -> None:
            (field.inside / name).write_bytes(content)

        yield data_case(f"broken table {name}", turn(number), broken, name)
    for number, suffix in enumerate(("jsonl", "json", "csv", "tsv", "parquet", "tar")):
        for kind, place in PLACES.items():
            if kind == "a folder":
                continue
            yield data_case(
                f"a {suffix} that is {kind}",
                turn(number),
                lambda field, place=place, suffix=suffix: place(field.inside / f"m.{suffix}", field),
                f"m.{suffix}",
            )
    for number, video in enumerate(_VIDEO_NAMES):

        def named(field: Field, video: str = video) -> None:
            filled = video.format(port=field.port, secret=field.secret)
            rows = [{"video": filled, "caption": "x"}, {"video": "ok.mp4", "caption": "fine"}]
            (field.inside / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (field.inside / "ok.mp4").write_bytes(good_clip())

        yield data_case(f"a row of {video}", turn(number), named, "m.jsonl", codes=LEFT_OUT)
    for name, columns in _PARQUETS.items():

        def written(field: Field, columns: dict[str, object] = columns) -> None:
            parquet.write_table(pa.table(columns), field.inside / "m.parquet")

        yield data_case(f"parquet of {name}", "inspect", written, "m.parquet")


def _equal(text: str, rows: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [text])


_PARQUETS: dict[str, dict[str, object]] = {
    "bytes": {"video": [b"bytes"], "caption": ["x"]},
    "lists": {"video": [["a"]], "caption": ["x"]},
    "nothing": {"video": pa.array([], pa.string()), "caption": pa.array([], pa.string())},
    "nulls": {"video": [None], "caption": [None]},
    "a dictionary": {"video": pa.array(["a"]).dictionary_encode(), "caption": [{"a": 1}]},
    "many equal rows": {"video": _equal("x", 11_000_000), "caption": _equal("x", 11_000_000)},
}


def _member(archive: tarfile.TarFile, name: str, kind: bytes, link: str = "", size: int = 0) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    archive.addfile(info, io.BytesIO(bytes(size)) if size else None)


def _linking(kind: bytes, link: str) -> Callable[[Path, Field], object]:
    def make(path: Path, field: Field) -> None:
        with tarfile.open(path, "w") as archive:
            _member(archive, "a.mp4", kind, link.format(secret=field.secret))
            _member(archive, "a.txt", kind, link.format(secret=field.secret))

    return make


def _members(**members: bytes) -> Callable[[Path, Field], object]:
    return lambda path, field: pack(path, {name.replace("__", "."): data for name, data in members.items()})


def _packed(mode: str) -> Callable[[Path, Field], object]:
    def make(path: Path, field: Field) -> None:
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            _member(archive, "a.mp4", tarfile.REGTYPE, size=1_000_000)

    return make


_ARCHIVES: dict[str, Callable[[Path, Field], object]] = {
    "link to the secret": _linking(tarfile.SYMTYPE, "{secret}"),
    "hard link to the secret": _linking(tarfile.LNKTYPE, "{secret}"),
    "link upwards": _linking(tarfile.SYMTYPE, "../outside/secret.txt"),
    "FIFO": _linking(tarfile.FIFOTYPE, ""),
    "block device": _linking(tarfile.BLKTYPE, ""),
    "character device": _linking(tarfile.CHRTYPE, ""),
    "unknown type": _linking(b"Z", ""),
    "sparse type": _linking(tarfile.GNUTYPE_SPARSE, ""),
    "long name of 20 GB": lambda path, field: sparse(
        path, head=tar_header("././@LongLink", HUGE - 4096, tarfile.GNUTYPE_LONGNAME)
    ),
    "long link of 20 GB": lambda path, field: sparse(
        path, head=tar_header("././@LongLink", HUGE - 4096, tarfile.GNUTYPE_LONGLINK)
    ),
    "text of 20 GB": lambda path, field: sparse(path, head=tar_header("x", HUGE - 4096, tarfile.XHDTYPE)),
    "a caption of 20 GB": lambda path, field: sparse(
        path, head=tar_header("a.txt", HUGE - 4096, tarfile.REGTYPE)
    ),
    "3000 headers in a chain": lambda path, field: pax(path, {"comment": "x"}, chained=3000),
    "size that leads back": lambda path, field: pax(path, {"size": "-1536"}),
    "size of 5000 digits": lambda path, field: pax(path, {"size": "9" * 5000}),
    "sparse 1.0": lambda path, field: pax(path, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
    "sparse map": lambda path, field: pax(path, {"GNU.sparse.map": "0,x", "GNU.sparse.size": "9"}),
    "path in a header": lambda path, field: pax(path, {"path": "../../../outside/new.mp4"}),
    "escapes in a header": lambda path, field: pax(path, {"path": "\x1b[2J\x1b]0;owned\x07.mp4"}),
    "gzip": _packed("w:gz"),
    "bzip2": _packed("w:bz2"),
    "xz": _packed("w:xz"),
    "no caption": _members(a__mp4=b"x"),
    "caption of bytes": _members(a__mp4=b"x", a__txt=b"\xff\xfe\x00"),
    "caption of brackets": _members(a__mp4=b"x", a__json=b'{"caption": ' + b"[" * 100_000),
    "caption of digits": _members(a__mp4=b"x", a__json=b'{"caption": ' + b"9" * 5000 + b"}"),
    "caption of a list": _members(a__mp4=b"x", a__json=b'{"caption": [[1]]}'),
    "noise": lambda path, field: path.write_bytes(bytes(range(256)) * 99),
    "nothing": lambda path, field: path.write_bytes(b""),
    "zeros": lambda path, field: path.write_bytes(bytes(10240)),
}
_UPWARDS = ("../../outside/new.mp4", "/tmp/hostile-new.mp4", "a/../../../outside/new.mp4", "\x1b[2J.mp4")


def _archive_cases() -> Iterator[Case]:
    for number, (name, prepare) in enumerate(_ARCHIVES.items()):
        yield data_case(
            f"archive, {name}",
            turn(number),
            lambda field, prepare=prepare: prepare(field.inside / "a.tar", field),
            "a.tar",
        )
    for number, member in enumerate(_UPWARDS):

        def up(field: Field, member: str = member) -> None:
            caption = str(Path(member).with_suffix(".txt"))
            pack(
                field.inside / "a.tar",
                {member: good_clip(), caption: b"x", "b.mp4": good_clip(), "b.txt": b"x"},
            )

        yield data_case(f"archive with a member {member!r}", turn(number), up, "a.tar", codes=LEFT_OUT)
    for number, (name, text) in enumerate(PLAYLISTS.items()):

        def listed(field: Field, text: str = text) -> None:
            filled = text.replace("{port}", str(field.port)).replace("{secret}", str(field.secret))
            members = {f"good{i}.{suffix}": data for i in range(3) for suffix, data in _pair().items()}
            pack(field.inside / "a.tar", {"a.mp4": filled.encode(), "a.txt": b"x", **members})

        yield data_case(f"archive with {name}", turn(number), listed, "a.tar", codes=LEFT_OUT)


def _pair() -> dict[str, bytes]:
    return {"mp4": good_clip(), "txt": b"x"}


_ARROWS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(b"noise" * 99),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "bytes of ones": lambda path: path.write_bytes(path.read_bytes()[:8] + b"\xff" * 99),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}
_OFFSETS = ([0, 0x7FFFFFF0, 18], [0, -2_000_000_000, 18], [0, 9, 300_000], [9, 0, 18], [-1, 9, 18])


def _dataset(field: Field) -> Path:
    rows = [{"video": f"{i}.mp4", "caption": f"caption {i}"} for i in range(3)]
    return save_dataset(field.inside / "set", rows)


def _dataset_cases() -> Iterator[Case]:
    for number, state in enumerate(STATES):

        def stated(field: Field, state: str = state) -> None:
            (_dataset(field) / "state.json").write_text(state)

        yield data_case(f"data set with state {number}", turn(number), stated, "set")
    for number, (name, change) in enumerate(_ARROWS.items()):

        def changed(field: Field, change: Callable[[Path], object] = change) -> None:
            change(sorted(_dataset(field).glob("*.arrow"))[0])

        yield data_case(f"data set with a file, {name}", turn(number), changed, "set")
    for number, offsets in enumerate(_OFFSETS):

        def moved(field: Field, offsets: list[int] = offsets) -> None:
            path = sorted(_dataset(field).glob("*.arrow"))[0]
            right, wrong = struct.pack("<3i", 0, 9, 18), struct.pack("<3i", *offsets)
            path.write_bytes(path.read_bytes().replace(right, wrong))

        yield data_case(f"data set with offsets {offsets}", turn(number), moved, "set")

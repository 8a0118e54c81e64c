"""Reads whatever an entry of the training data names, and splits it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sat_train.data.remote import find_remote, make_path
from sat_train.data.sources.archives import read_archives
from sat_train.data.sources.folder import read_folder
from sat_train.data.sources.hf_dataset import is_hf_dataset, read_hf_dataset
from sat_train.data.sources.manifest import read_manifest
from sat_train.data.sources.records import ClipRecord, ClipSource
from sat_train.errors import DataError
from sat_train.patterns import expand_braces, find_local


def read_source(path: str | Path) -> ClipSource:
    """Reads what is at a place: a folder of clips, a manifest, tar archives, or a Hugging Face dataset.

    Args:
        path: The place. `.tar` archives may be remote (`s3://bucket/set`), and several at once: `{000..099}`,
            `{a,b}`, `*.tar`.

    Raises:
        DataError: There is nothing at `path`, no clip in it, or a clip without caption.
    """
    entry = str(path)
    if entry.startswith("file://"):
        entry = str(make_path(entry))
    if "://" in entry:
        return read_archives(entry, find_remote(entry))
    if not Path(entry).exists() and (places := _matches(entry)):
        return read_archives(entry, places)
    return _read_place(Path(entry), name=entry)


def _matches(entry: str) -> list[Path]:
    """Returns the archives that a pattern stands for, in its order; none where it is no pattern."""
    names = expand_braces(entry)
    archives: list[Path] = []
    for name in names:
        places = find_local(name)
        if not places and len(names) > 1:
            raise _nothing_at(name)
        for place in places:
            inside = sorted(place.glob("*.tar")) if place.is_dir() else [place]
            if not inside or any(path.suffix != ".tar" for path in inside):
                raise DataError(
                    f"{entry}: {place} is no .tar archive and no folder of them",
                    expected="a pattern that stands for archives only",
                )
            archives += inside
    return list(dict.fromkeys(archives))


def _read_place(place: Path, *, name: str) -> ClipSource:
    if place.is_dir():
        if is_hf_dataset(place):
            return read_hf_dataset(place)
        archives = sorted(place.glob("*.tar"))
        return read_archives(name, archives) if archives else read_folder(place)
    if place.is_file():
        return read_archives(name, [place]) if place.suffix == ".tar" else read_manifest(place)
    raise _nothing_at(name)


def _nothing_at(name: str) -> DataError:
    return DataError(
        f"{name}: there is no such folder or file",
        expected="a folder with videos/ and labels/, a manifest (.jsonl, .csv, .parquet), or .tar archives",
        remedy="correct args.train_data or args.valid_data",
    )


def split_source(source: ClipSource, shares: Sequence[float], part: int) -> ClipSource:
    """Takes one part of a set, by a hash of the names: more clips later do not move the others.

    Args:
        shares: Of training, validation and test, in any unit.
        part: Which of them.
    """
    total, below = sum(shares), sum(shares[:part])
    low, high = below / total, (below + shares[part]) / total

    def place(record: ClipRecord) -> float:
        digest = hashlib.blake2b(record.clip_id.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    return source.with_records([record for record in source.records if low <= place(record) < high])

"""Where clips and captions come from: every kind of source gives the same sorted list of records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sat_train.data.archives import read_archives
from sat_train.data.folder import read_folder
from sat_train.data.hf_dataset import is_hf_dataset, read_hf_dataset
from sat_train.data.manifest import read_manifest
from sat_train.data.records import ClipRecord, ClipSource
from sat_train.errors import DataError


def read_source(path: str | Path) -> ClipSource:
    """Reads what is at a place: a folder of clips, a manifest, tar archives, or a Hugging Face dataset.

    Raises:
        DataError: There is nothing at `path`, no clip in it, or a clip without caption.
    """
    place = Path(path)
    if place.is_dir():
        if is_hf_dataset(place):
            return read_hf_dataset(place)
        archives = sorted(place.glob("*.tar"))
        return read_archives(str(path), archives) if archives else read_folder(place)
    if place.is_file():
        return read_archives(str(path), [place]) if place.suffix == ".tar" else read_manifest(place)
    raise DataError(
        f"{path}: there is no such folder or file",
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

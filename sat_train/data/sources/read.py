"""Reads the sources of the training data, and splits them into parts."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sat_train.config.facts import ClipCounts
from sat_train.config.schema.data_section import DataConfig
from sat_train.data.clips.remote import find_remote, make_path, public_url
from sat_train.data.sources.archives import read_archives
from sat_train.data.sources.clip_manifest import read_manifest
from sat_train.data.sources.columns import KINDS
from sat_train.data.sources.folder import read_folder
from sat_train.data.sources.hf_dataset import is_hf_dataset, read_hf_dataset
from sat_train.data.sources.links import check_links
from sat_train.data.sources.lists import ALL_LISTS
from sat_train.data.sources.records import DEFAULT_OPTIONS, ClipRecord, ClipSource, SourceOptions
from sat_train.errors import DataError
from sat_train.patterns import expand_braces, find_local

_LEAST_EPOCH, _LONGEST_EPOCH = 1e-6, 1e8  # samples, by the weights


def build_source_options(data: DataConfig) -> SourceOptions:
    """Builds the options for reading sources from section `data`."""
    names = {kind: getattr(data.columns, kind) for kind in KINDS}
    return SourceOptions(
        columns={kind: name for kind, name in names.items() if name is not None},
        follow_links=data.follow_links,
        max_bad_fraction=data.max_bad_fraction,
        fields=data.fields,
    )


def read_source(path: str | Path, options: SourceOptions = DEFAULT_OPTIONS) -> ClipSource:
    """Reads a source: a folder of clips, a manifest, tar archives, or a Hugging Face dataset.

    Args:
        path: Its path. `.tar` archives may be remote (`s3://bucket/set`), and several at once: `{000..099}`,
            `{a,b}`, `*.tar`.
        options: Names of columns, handling of links, and the share of clips that may be unusable.

    Raises:
        DataError: `path` does not exist, holds no clip, or too many of its clips cannot be used.
    """
    name = str(path)
    if name.startswith("file://"):
        name = str(make_path(name))
    if "://" in name:
        return read_archives(public_url(name), find_remote(name), options)
    if not Path(name).exists() and (places := _matches(name)):
        return read_archives(name, places, options)
    return _read_place(Path(name), name, options)


def _matches(pattern: str) -> list[Path]:
    """Returns the archives that match a pattern, in its order; none if it is not a pattern."""
    names = expand_braces(pattern)
    archives: list[Path] = []
    for name in names:
        places = find_local(name)
        if not places and len(names) > 1:
            raise _nothing_at(name)
        for place in places:
            inside = sorted(place.glob("*.tar")) if place.is_dir() else [place]
            if not inside or any(path.suffix != ".tar" for path in inside):
                raise DataError(
                    f"{pattern}: {place} is neither a .tar archive nor a folder of them",
                    expected="a pattern that matches archives only",
                )
            archives += inside
    return list(dict.fromkeys(archives))


def _read_place(place: Path, name: str, options: SourceOptions) -> ClipSource:
    if place.is_dir():
        if is_hf_dataset(place):
            return read_hf_dataset(place, options)
        archives = sorted(place.glob("*.tar"))
        if not archives:
            return read_folder(place, options)
        check_links(place, archives, options)
        return read_archives(name, archives, options)
    if place.is_file():
        if place.suffix == ".tar":
            return read_archives(name, [place], options)
        if place.name in ALL_LISTS:
            raise DataError(
                f"{name}: this list is one of a pair",
                remedy=f"name the folder that holds both: {place.parent}",
            )
        return read_manifest(place, options)
    raise _nothing_at(name)


def _nothing_at(name: str) -> DataError:
    return DataError(
        f"{name}: there is no such folder or file",
        expected="a folder with videos/ and labels/, a manifest (.jsonl, .json, .csv, .parquet), .tar files",
        remedy="correct args.train_data or args.valid_data",
    )


PARTS = ("training", "validation", "test")


def read_sources(
    paths: Sequence[str], options: SourceOptions, *, shares: Sequence[float] | None, part: int
) -> list[ClipSource]:
    """Reads the sources of a set, or one part of each.

    Args:
        paths: Items of `args.train_data` or `args.valid_data`.
        options: Options for reading them.
        shares: Shares of training, validation and test in each source; None: sources are not split.
        part: Index into `PARTS` of the part to read.

    Raises:
        DataError: As `read_source`; or the part is empty, or all its weights are 0.
    """
    sources = [read_source(path, options) for path in paths]
    if shares is not None:
        sources = _take_part(sources, shares, part)
    if PARTS[part] == "training":
        for source in sources:
            _check_weights(source)
    return sources


def _take_part(sources: Sequence[ClipSource], shares: Sequence[float], part: int) -> list[ClipSource]:
    """Returns one part of each source; for validation, of the sources that have one."""
    parts = [split_source(source, shares, part) for source in sources]
    non_empty = [source for source in parts if len(source)]
    if non_empty and (PARTS[part] != "training" or len(non_empty) == len(parts)):
        return non_empty
    empty = next(source for source, of in zip(sources, parts, strict=True) if not len(of))
    split = ",".join(f"{share:g}" for share in shares)
    raise DataError(
        f"the {PARTS[part]} part of args.split={split} is empty: 0 of {len(empty)} clips of {empty.name}",
        expected="at least one clip for each part whose share is above 0",
        remedy="add clips, or train on all without validation: args.split=1,0,0 args.eval_interval=null",
    )


def split_source(source: ClipSource, shares: Sequence[float], part: int) -> ClipSource:
    """Selects one part of a source, by a hash of the names, so that new clips do not move others.

    A part whose share is above 0 has at least one clip, as far as there are clips; earlier parts come first.

    Args:
        source: The set.
        shares: Shares of training, validation and test, in any unit.
        part: Index into `PARTS` of the part to take.
    """
    places = [_place(record) for record in source.records]
    edges = [sum(shares[: i + 1]) / sum(shares) for i in range(len(shares))]
    parts = [bisect.bisect_right(edges, place) for place in places]
    for i, share in enumerate(shares):
        if share and i not in parts:
            _fill(i, parts, places, edges)
    subset = source.with_records([r for r, of in zip(source.records, parts, strict=True) if of == part])
    return replace(subset, part=f"its {PARTS[part]} part, {len(subset)} of {len(source)} clips")


def _place(record: ClipRecord) -> float:
    digest = hashlib.blake2b(record.clip_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _fill(part: int, parts: list[int], places: Sequence[float], edges: Sequence[float]) -> None:
    """Moves the nearest clip into an empty part, from one with more clips, or from a later part."""
    low, high = edges[part - 1] if part else 0.0, edges[part]
    movable = [i for i, of in enumerate(parts) if of > part or parts.count(of) > 1]
    if movable:
        parts[min(movable, key=lambda i: max(low - places[i], places[i] - high))] = part


def _check_weights(source: ClipSource) -> None:
    total = sum(record.weight for record in source.records)
    if source.records and not _LEAST_EPOCH <= total <= _LONGEST_EPOCH:
        raise DataError(
            f"{source.name}: the weights of its {len(source)} clips sum up to {total:g}",
            expected=f"the samples of one epoch, {_LEAST_EPOCH:g} to {_LONGEST_EPOCH:g}",
            remedy="correct the column `weight`, or leave this source out",
        )


def count_clips(
    train: Sequence[str],
    valid: Sequence[str] | None,
    *,
    shares: Sequence[float],
    options: SourceOptions = DEFAULT_OPTIONS,
) -> ClipCounts:
    """Counts the clips of training and validation data.

    Args:
        train: Entries of `args.train_data`.
        valid: Entries of `args.valid_data`; None: a share of `train`.
        shares: Of `train` for training, validation and test, where `valid` is None.
        options: Options for reading them.

    Raises:
        DataError: A source cannot be read, or a part is empty.
    """
    if valid:
        parts = [
            read_sources(entries, options, shares=None, part=i) for i, entries in enumerate((train, valid))
        ]
    else:
        needed_parts = [0, 1] if shares[1] else [0]
        parts = [read_sources(train, options, shares=shares, part=part) for part in needed_parts]
    counts = [sum(map(len, part)) for part in parts]
    return ClipCounts(counts[0], counts[1] if len(counts) > 1 else 0)

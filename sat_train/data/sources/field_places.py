"""Finds the values of fields: in the columns of a table, or in folders next to `videos/`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sat_train.config.parts.field_parts import FieldConfig, FieldParams
from sat_train.data.clips.clip_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sat_train.data.sources.columns import cell_path
from sat_train.data.sources.listing import Listing, exchange_folder
from sat_train.data.sources.records import (
    ClipRecord,
    FieldFile,
    FieldPlace,
    check_name,
    clean_caption,
)
from sat_train.errors import DataError

_GROUPS = {"video": VIDEO_SUFFIXES, "image": IMAGE_SUFFIXES}
_INLINE_CHARS = 1 << 20
Fields = Mapping[str, FieldConfig]


def suffixes_of(params: FieldParams) -> tuple[str, ...]:
    """Returns the suffixes of the files that a kind of field reads, in the order in which they count."""
    return tuple(suffix for group in params.files for suffix in _GROUPS.get(group, (group,)))


def wanted_columns(fields: Fields) -> dict[str, str]:
    """Returns the column of each field, if a table has it."""
    return {name: each.settings.column or name for name, each in fields.items()}


def columns_of(fields: Fields, names: Iterable[str]) -> dict[str, str]:
    """Returns the column of each field that a table has."""
    names = set(names)
    return {name: column for name, column in wanted_columns(fields).items() if column in names}


@dataclass(frozen=True)
class FieldFinder:
    """Finds the fields of clips of one source.

    Args:
        fields: The fields, by name.
        root: Where relative paths of a table start, absolute.
        listing: Finds files next to clips; None: only cells count.
        place: Where a cell is looked for, for messages.
    """

    fields: Fields = field(default_factory=dict)
    root: Path = Path("/")
    listing: Listing | None = None
    place: str = "column `{}`"

    def add(self, record: ClipRecord, cells: Mapping[str, Any] | None = None) -> ClipRecord:
        """Returns a clip with the places of its fields.

        Args:
            record: The clip.
            cells: What the columns of a table say, by field; None: there is no table.

        Raises:
            DataError: One is missing or makes no sense; it is named.
        """
        places = {}
        for name, each in self.fields.items():
            params = each.settings
            try:
                place = self._place(name, params, record, cells)
            except DataError as error:
                raise DataError(f"field `{name}`: {error.problem}") from None
            begins = record.start if getattr(params, "begins", "file") == "part" else None
            places[name] = FieldPlace(place.files, place.value, begins or 0.0)
        return replace(record, fields=places) if places else record

    def _place(
        self, name: str, params: FieldParams, record: ClipRecord, cells: Mapping[str, Any] | None
    ) -> FieldPlace:
        if cells is not None and name in cells:
            return place_of(cells[name], params, name, self.root)
        folder = params.column or name
        if self.listing is None:
            raise DataError(f"there is no {self.place.format(folder)}")
        files = self._beside(record.path, params, folder, self.listing)
        if len(files) < params.num_files:
            column = "" if cells is None else f"there is no column `{folder}`, and "
            raise DataError(f"{column}{_nothing_beside(record.path, params, folder, len(files))}")
        return FieldPlace(tuple(make_file(path) for path in files))

    @staticmethod
    def _beside(clip: Path, params: FieldParams, folder: str, listing: Listing) -> list[Path]:
        """Returns the files of the clip's name in a folder next to `videos/`, or of its name and a number."""
        check_name(folder)
        if "/" in folder or folder.startswith("."):
            raise DataError(f"`{folder}` is no name of a folder next to videos/")
        suffixes = suffixes_of(params)
        one = listing.find_beside(clip, folder, suffixes)
        if one is not None:
            return [one]
        numbered = (clip.with_name(f"{clip.stem}_{i}{clip.suffix}") for i in range(params.num_files + 1))
        found = [listing.find_beside(path, folder, suffixes) for path in numbered]
        files = [path for path in found if path is not None]
        if len(files) > params.num_files:
            raise DataError(f"there are more than {params.num_files} files for it in {folder}/")
        return files


def place_of(cell: Any, params: FieldParams, name: str, root: Path) -> FieldPlace:
    """Returns what one cell of a table says about a field: the value, or the paths of files.

    Raises:
        DataError: Neither.
    """
    cells = cell if isinstance(cell, list) else [cell]
    files = tuple(each for each in cells if isinstance(each, FieldFile))
    if files:
        return _place_of_files(files, params)
    if params.inline == "text":
        if not isinstance(cell, str):
            raise DataError("it is not a text")
        return FieldPlace(value=clean_caption(cell, "its column"))
    paths = _parse_list(cell) if isinstance(cell, str) else cells
    if params.inline == "numbers" and not all(isinstance(path, str) for path in paths):
        value = json.dumps(cell) if not isinstance(cell, str) else cell
        if len(value) > _INLINE_CHARS:
            raise DataError(f"its numbers take more than {_INLINE_CHARS:,} letters; write them to a file")
        return FieldPlace(value=value)
    named = (make_file(root / cell_path({name: path}, name, root)) for path in paths)
    return _place_of_files(tuple(named), params)


def _place_of_files(files: tuple[FieldFile, ...], params: FieldParams) -> FieldPlace:
    """Checks the number of files, and that this kind of field reads them."""
    if len(files) != params.num_files:
        raise DataError(f"it has {len(files)} files, not {params.num_files}")
    suffixes = suffixes_of(params)
    for file in files:
        is_nameless = file.span is not None and not file.suffix
        if suffixes and file.suffix not in suffixes and not is_nameless:
            raise DataError(f"{file.path.name} has not one of the suffixes {' '.join(suffixes)}")
    return FieldPlace(files)


def make_file(path: Path) -> FieldFile:
    """Returns a file under its own suffix."""
    return FieldFile(path, suffix=path.suffix.lower())


def member_cells(
    fields: Fields, members: Mapping[str, FieldFile]
) -> tuple[dict[str, list[FieldFile]], set[str]]:
    """Returns the members of an archive that hold the fields of a clip, and their suffixes.

    Args:
        fields: The fields.
        members: Members of the clip's key by all that follows it, such as `.control.mp4`.
    """
    used: dict[str, list[str]] = {}
    for name, column in wanted_columns(fields).items():
        params = fields[name].settings
        stems = [f".{column.lower()}", *(f".{column.lower()}_{i}" for i in range(params.num_files + 1))]
        found = (_first(stem, suffixes_of(params), members) for stem in stems)
        if own := [suffix for suffix in found if suffix is not None]:
            used[name] = own
    cells = {name: [members[suffix] for suffix in own] for name, own in used.items()}
    return cells, {suffix for own in used.values() for suffix in own}


def _first(stem: str, suffixes: tuple[str, ...], members: Mapping[str, FieldFile]) -> str | None:
    return next((f"{stem}{suffix}" for suffix in suffixes if f"{stem}{suffix}" in members), None)


def field_files(records: Iterable[ClipRecord]) -> set[Path]:
    """Returns all files that hold fields of clips."""
    return {file.path for each in records for place in each.fields.values() for file in place.files}


def _parse_list(text: str) -> list[Any]:
    """Returns the items of a list that stands as JSON in a cell; of any other text, the text."""
    if not text.lstrip().startswith("["):
        return [text]
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    return content if isinstance(content, list) else [text]


def _nothing_beside(clip: Path, params: FieldParams, folder: str, count: int) -> str:
    path, base = exchange_folder(clip, folder)
    if base is None:
        return f"no folder `videos` is in {clip}, next to which a folder `{folder}` could lie"
    kinds = " ".join(params.files)
    if params.num_files > 1:
        return f"there are {count} of {params.num_files} files {path}_0, ... ({kinds})"
    return f"there is no {path}.* ({kinds})"

"""Reads clips and captions listed line by line in two files: `videos.txt` and `prompt.txt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sat_train.data.clips.clip_file import IMAGE_SUFFIXES
from sat_train.data.sources.clip_manifest import cells_of, make_record
from sat_train.data.sources.field_places import FieldFinder, Fields, columns_of, field_files
from sat_train.data.sources.listing import Found, Listing, describe
from sat_train.data.sources.records import ClipRecord, ClipSource, SourceOptions, check_faults, make_source
from sat_train.data.sources.tables import read_lines as read_lines_of
from sat_train.errors import DataError
from sat_train.files import reading

VIDEO_LIST = "videos.txt"
IMAGE_LIST = "images.txt"
CAPTION_LISTS = ("prompt.txt", "prompts.txt", "caption.txt", "captions.txt")
_FIELD = "field "  # before the name of a field, among what lists hold
ALL_LISTS = (VIDEO_LIST, IMAGE_LIST, *CAPTION_LISTS)


@dataclass(frozen=True)
class Lists:
    """The lists of a folder.

    Args:
        videos: Names a clip in each line.
        captions: Its caption in the same line.
        images: The picture that conditions it, likewise; None: there is no such list.
        fields: Lists of values of fields, by the name of the field.
    """

    videos: Path
    captions: Path
    images: Path | None
    fields: Mapping[str, Path] = field(default_factory=dict)

    @property
    def paths(self) -> dict[str, Path]:
        """The lists by what they hold."""
        paths = {"video": self.videos, "caption": self.captions}
        paths |= {"image": self.images} if self.images else {}
        return paths | {f"{_FIELD}{name}": path for name, path in self.fields.items()}


@dataclass(frozen=True)
class FoundLists:
    """The lists found in a folder, complete or not."""

    names: tuple[str, ...]
    complete: Lists | None

    def hint(self) -> str:
        """Returns a hint how lists could supply missing captions."""
        if self.complete:
            return ""
        if not self.names:
            return f", or list clips in {VIDEO_LIST} and captions in {CAPTION_LISTS[0]}, line by line"
        missing = CAPTION_LISTS[0] if VIDEO_LIST in self.names else VIDEO_LIST
        return f". {self.names[0]} is there, {missing} is missing: with both, captions are read line by line"


def find_lists(root: Path, texts: Sequence[Path], fields: Fields) -> FoundLists:
    """Finds the lists directly in a folder, those of fields (`NAME.txt`) included.

    Raises:
        DataError: Several files may hold the captions.
    """
    names = [path.name for path in texts if path.parent == root and path.name in ALL_LISTS]
    captions = [name for name in CAPTION_LISTS if name in names]
    if VIDEO_LIST not in names or not captions:
        return FoundLists(tuple(names), None)
    if len(captions) > 1:
        raise DataError(
            f"{root}: {' and '.join(captions)} may both hold the captions of {VIDEO_LIST}",
            expected="one of them",
            remedy="rename the other one",
        )
    images = root / IMAGE_LIST if IMAGE_LIST in names else None
    columns = columns_of(fields, (path.stem for path in texts if path.parent == root))
    own = {name: root / f"{column}.txt" for name, column in columns.items()}
    return FoundLists(tuple(names), Lists(root / VIDEO_LIST, root / captions[0], images, own))


def read_lists(
    root: Path, listing: Listing, files: Found, lists: Lists, options: SourceOptions
) -> ClipSource:
    """Reads the clips of a folder that its lists name. Paths start at the folder.

    Args:
        root: The folder, as the user wrote it.
        listing: Listing of the folder.
        files: The files in it.
        lists: Its lists.
        options: How many lines may be unusable.

    Raises:
        DataError: The lists have different numbers of lines, or more lines are unusable than allowed.
    """
    rows = _read_rows(lists)
    finder = FieldFinder(options.fields, listing.root, listing)
    records: list[ClipRecord] = []
    faults: list[tuple[str, str]] = []
    for number, row in rows:
        try:
            cells = _filled(row, lists, number)
            record = make_record(cells, listing.root)
            record = finder.add(record, cells_of(cells, {name: f"{_FIELD}{name}" for name in lists.fields}))
        except DataError as error:
            faults.append((f"{lists.videos}:{number}", error.problem))
            continue
        listing.use(record.path)
        image = record.image or listing.find_beside(record.path, "images", IMAGE_SUFFIXES)
        records.append(replace(record, image=image and listing.use(image)))
    problem = f"{root}: {len(faults)} of {len(rows)} lines of {VIDEO_LIST} cannot be used"
    check_faults(faults, problem, allowed=options.max_bad_fraction * len(rows))
    if not records:
        raise DataError(f"{lists.videos}: this list is empty", expected="one clip in each line")
    used = set(lists.paths.values())
    for path in used:
        listing.use(path)
    listing.check_links()
    used |= {record.image for record in records if record.image} | field_files(records)
    listed_paths = {record.path for record in records}
    unnamed = [path for path in files.clips if path not in listed_paths | used]
    notes = [
        *describe(listing.root, f"clips are not in {VIDEO_LIST}, and not used", unnamed),
        *files.notes(listing.root, used),
    ]
    return make_source(str(root), records, ignored=files.unused(used), notes=notes, faults=faults)


def _read_rows(lists: Lists) -> list[tuple[int, dict[str, str]]]:
    """Returns the cells of each line of all lists; lines that are blank in all of them are left out.

    Lists of different length are compared without their blank lines too, as other trainers read them.
    """
    paths = lists.paths
    columns = {kind: _read_column(path) for kind, path in paths.items()}
    if len(set(map(len, columns.values()))) > 1:
        columns = {kind: [line for line in lines if line] for kind, lines in columns.items()}
    if len(set(map(len, columns.values()))) > 1:
        counts = ", ".join(f"{paths[kind].name} {len(lines)}" for kind, lines in columns.items())
        raise DataError(
            f"{lists.videos.parent}: the lists have different numbers of lines: {counts}",
            expected="the caption of each clip in the line of the same number",
        )
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return [(number, row) for number, row in enumerate(rows, 1) if any(row.values())]


def _read_column(path: Path) -> list[str]:
    with reading(path, error=DataError, expected="one line for each clip"):
        lines = [line.strip() for _, line in read_lines_of(path)]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _filled(row: dict[str, str], lists: Lists, number: int) -> dict[str, str]:
    """Returns the cells of a line that are not blank.

    Raises:
        DataError: The clip or its caption is missing.
    """
    for kind, path in (("video", lists.videos), ("caption", lists.captions)):
        if not row[kind]:
            raise DataError(f"line {number} of {path.name} is blank")
    return {kind: text for kind, text in row.items() if text}

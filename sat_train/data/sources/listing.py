"""Lists a folder of clips, each subfolder once, and collects links that lead out of it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sat_train.data.clips.clip_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from sat_train.data.sources.links import leads_out, refuse_links
from sat_train.data.sources.records import SourceOptions, name_some
from sat_train.errors import DataError


@dataclass
class Found:
    """The files of a folder, at any depth.

    Args:
        clips: Videos, and pictures below a folder `videos`.
        pictures: The other pictures.
        texts: Files `.txt`.
        field_files: Files in the folders of fields, which stand next to `videos`.
        others: How many other files there are, by suffix.
        hidden: Files and folders whose names begin with a dot.
        repeated: Linked folders that were found in another place too.
    """

    clips: list[Path] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    texts: list[Path] = field(default_factory=list)
    field_files: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    hidden: list[Path] = field(default_factory=list)
    repeated: list[Path] = field(default_factory=list)

    def unused(self, used: set[Path]) -> Counter[str]:
        """Returns the number of unused files by suffix.

        Args:
            used: Captions, pictures and lists that are.
        """
        unused_paths = (path for path in (*self.pictures, *self.texts, *self.field_files) if path not in used)
        return self.others + Counter(path.suffix.lower() for path in unused_paths)

    def notes(self, root: Path, used: set[Path]) -> list[str]:
        """Returns sentences that name unused files that may have been meant to be used."""
        groups = [
            ("pictures are neither images/NAME of a clip videos/NAME nor in videos/", self.pictures),
            ("text files have the name of no clip", self.texts),
            ("files in the folders of fields belong to no clip", self.field_files),
            ("hidden files or folders are not read", self.hidden),
            ("linked folders are here twice and read once", self.repeated),
        ]
        return [
            sentence
            for what, paths in groups
            for sentence in describe(root, what, [path for path in paths if path not in used])
        ]


class Listing:
    """Lists folders and finds files in them by stem and suffix, in any case of the suffix.

    Args:
        root: The folder that was given, absolute.
        options: `follow_links` and the names of folders of `fields` are read.
    """

    def __init__(self, root: Path, options: SourceOptions) -> None:
        self.root = root
        self._real_root = os.path.realpath(root)
        self._follows = options.follow_links
        self._field_folders = {each.settings.column or name for name, each in options.fields.items()}
        self._stems: dict[Path, dict[str, list[str]]] = {}
        self._links: set[Path] = set()  # links, and folders behind links
        self._leading_out: dict[Path, None] = {}

    def walk(self) -> Found:
        """Lists the root.

        Raises:
            DataError: A folder below it cannot be listed, or a linked one lies elsewhere.
        """
        files, seen, waiting = Found(), set(), [self.root]
        while waiting:
            folder = waiting.pop()
            real = os.path.realpath(folder)
            if real in seen:
                files.repeated.append(folder)
                continue
            seen.add(real)
            folders = []
            for entry in self._scan(folder):
                path = Path(entry.path)
                if entry.name.startswith("."):
                    files.hidden.append(path)
                elif not _is_folder(entry):
                    self._sort(path, files)
                elif self._may_follow(path, is_link=entry.is_symlink()):
                    folders.append(path)
            waiting += sorted(folders, reverse=True)
        self.check_links()
        files.clips.sort()
        return files

    def find(self, stem: Path, suffixes: tuple[str, ...], *, base: Path | None = None) -> Path | None:
        """Finds a file by stem and one of several suffixes; lower case wins, then the first suffix.

        Args:
            stem: Path without suffix.
            suffixes: In small letters.
            base: The folder that the file must lie in, where it is not below the root.
        """
        if stem.parent not in self._stems:
            list(self._scan(stem.parent, may_fail=True))
        fitting = []
        for name in self._stems[stem.parent].get(stem.name, ()):
            suffix = Path(name).suffix
            if suffix.lower() in suffixes:
                fitting.append((suffix != suffix.lower(), suffixes.index(suffix.lower()), name))
        if not fitting:
            return None
        path = stem.parent / min(fitting)[2]
        if base is None:
            self._may_follow(path, is_link=path in self._links)
        else:
            self._check_base(path, base)
        return path

    def find_beside(self, clip: Path, folder: str, suffixes: tuple[str, ...]) -> Path | None:
        """Finds the counterpart of `.../videos/a/b.mp4` in another folder: `.../labels/a/b.txt`, ..."""
        path, base = exchange_folder(clip, folder)
        if base is None:
            return None
        return self.find(path, suffixes, base=None if path.is_relative_to(self.root) else base)

    def use(self, path: Path) -> Path:
        """Returns a file of the root that will be read; a file that is outside is noted."""
        self._may_follow(path, is_link=path in self._links)
        return path

    def check_links(self) -> None:
        """Refuses the links found so far that lead out.

        Raises:
            DataError: There are some.
        """
        refuse_links(self.root, self._leading_out)

    def _may_follow(self, path: Path, *, is_link: bool) -> bool:
        if self._follows or not is_link or not leads_out(path, self._real_root):
            return True
        self._leading_out[path] = None
        return False

    def _check_base(self, path: Path, base: Path) -> None:
        real_base = os.path.join(os.path.realpath(base.parent), base.name)
        if not self._follows and leads_out(path, real_base):
            self._leading_out[path] = None

    def _scan(self, folder: Path, *, may_fail: bool = False) -> list[os.DirEntry[str]]:
        stems = self._stems.setdefault(folder, {})
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if may_fail and isinstance(error, (FileNotFoundError, NotADirectoryError)):
                return []
            raise DataError(f"{folder}: this folder cannot be listed: {error.strerror}") from None
        for entry in listed:
            if not _is_folder(entry):
                stems.setdefault(Path(entry.name).stem, []).append(entry.name)
            if entry.is_symlink():
                self._links.add(Path(entry.path))
        return listed

    def _sort(self, path: Path, files: Found) -> None:
        suffix, folders = path.suffix.lower(), path.relative_to(self.root).parts[:-1]
        if "videos" not in folders and not self._field_folders.isdisjoint(folders):
            files.field_files.append(path)
        elif suffix in VIDEO_SUFFIXES or (suffix in IMAGE_SUFFIXES and "videos" in path.parts[:-1]):
            files.clips.append(path)
        elif suffix in IMAGE_SUFFIXES:
            files.pictures.append(path)
        elif suffix == ".txt":
            files.texts.append(path)
        else:
            files.others[suffix or "(none)"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # of a link that leads to itself `DirEntry.is_dir` raises
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def exchange_folder(clip: Path, folder: str) -> tuple[Path, Path | None]:
    """Returns a clip's path without suffix, with its last folder `videos` replaced, and the new folder."""
    parts = list(clip.with_suffix("").parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "videos":
            parts[i] = folder
            return Path(*parts), Path(*parts[: i + 1])
    return Path(*parts), None


def describe(root: Path, what: str, paths: list[Path]) -> list[str]:
    """Returns a sentence that counts and names files, if there are any."""
    names = [path.relative_to(root).as_posix() for path in sorted(paths)]
    return [f"{len(names)} {what}: {name_some(names)}"] if names else []

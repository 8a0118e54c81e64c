"""Files that are complete or absent: written beside, hashed on the way, synced, renamed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_CHUNK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class FileRecord:
    """What a file must look like.

    Args:
        name: File name inside its folder.
        size: Bytes.
        sha256: Hex digest of the contents.
    """

    name: str
    size: int
    sha256: str


class HashingFile:
    """A file to be written once, front to back, which hashes what passes and keeps its first error for later.

    `torch.save` writes through C++, where an exception from `write` ends in a second one that hides the
    first; so `write` never raises, and `finish` does.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._digest = hashlib.sha256()
        self._error: OSError | None = None
        self.size = 0

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        if self._error is None:
            self._digest.update(data)
            self.size += count
            try:
                self._raw.write(data)
            except OSError as error:
                self._error = error
        return count

    def flush(self) -> None:
        """Does nothing: `finish` flushes and syncs."""

    def finish(self) -> str:
        """Syncs to disk and returns the SHA-256.

        Raises:
            OSError: The first error of any write, or of the sync.
        """
        if self._error is not None:
            raise self._error
        self._raw.flush()
        os.fsync(self._raw.fileno())
        return self._digest.hexdigest()


def write_file(path: Path, write: Callable[[HashingFile], None]) -> FileRecord:
    """Writes a file so that `path` is either complete and on disk, or as it was.

    Args:
        path: Where the file goes; its folder exists.
        write: Writes the contents.

    Raises:
        OSError: Disk full, no permission, I/O error. Nothing is left behind.
    """
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb", buffering=_CHUNK_BYTES) as raw:
            file = HashingFile(raw)
            write(file)
            sha256 = file.finish()
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return FileRecord(name=path.name, size=file.size, sha256=sha256)


def write_text(path: Path, text: str) -> FileRecord:
    """Writes a small text file as `write_file` does, and makes its name durable too."""

    def write(file: HashingFile) -> None:
        file.write(text.encode("utf-8"))

    record = write_file(path, write)
    sync_folder(path.parent)
    return record


def sync_folder(folder: Path) -> None:
    """Makes the names inside a folder durable: a rename may be lost in a power cut before this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's contents, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

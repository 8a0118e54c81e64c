"""Reads and writes files safely.

Reading: regular files only, with a size limit, so that a FIFO, a device or a sparse file in somebody's folder
neither blocks the program nor fills its memory. Writing: under a temporary name in the same folder, hashed,
synced and renamed, so that a file is complete or absent and a link in its place is replaced, never followed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from sat_train.errors import SatTrainError
from sat_train.json_record import Count, JsonRecord, Sha256

_CHUNK_BYTES = 16 * 1024 * 1024
_HASHED_APART = 1024 * 1024  # bytes from which a piece is hashed in a second thread
PART_SUFFIX = ".part"  # a file being written; one left behind by a kill may be deleted


class NotRegular(OSError):
    """A path that should be a regular file is a FIFO, a device, a socket or a folder."""


class TooLarge(OSError):
    """A file is larger than its limit."""


_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def open_regular(path: Path | str) -> BinaryIO:
    """Opens a regular file for reading, without ever blocking.

    A link at `path` is followed; the caller decides whether links are allowed.

    Raises:
        NotRegular: It is a FIFO, a device, a socket or a folder.
        OSError: It cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegular(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path | str, *, limit: int) -> bytes:
    """Reads a whole regular file.

    Args:
        limit: Largest size in bytes; a larger file is refused before it is read.

    Raises:
        NotRegular: It is not a regular file.
        TooLarge: It has more than `limit` bytes.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(content) > limit:  # a file of /proc has no size, and a file may grow meanwhile
        raise TooLarge(errno.EFBIG, f"has more than {limit:,} bytes", str(path))
    return content


def read_text(path: Path | str, *, limit: int) -> str:
    """Reads a whole UTF-8 text file as `read_bytes` does; line endings become `\\n`.

    Raises:
        UnicodeDecodeError: It is not UTF-8.
        OSError: As `read_bytes`.
    """
    return read_bytes(path, limit=limit).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def refuse_packed(path: Path | str) -> None:
    """Refuses a zip file that unpacks to more than its own size; other files pass.

    `torch.save` stores members uncompressed, so its files are never refused.

    Raises:
        TooLarge: It is compressed, or its members overlap.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            return
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            if sum(member.file_size for member in archive.infolist()) > size:
                raise TooLarge(errno.EFBIG, "unpacks to more than its own size", str(path))


@contextmanager
def reading(
    path: Path | str, *, error: type[SatTrainError], expected: str = "", remedy: str = ""
) -> Iterator[None]:
    """Converts any exception while a foreign file is read into an error that names the file.

    Parsers fail in as many ways as there are broken files (RecursionError, IndexError, UnpicklingError, ...),
    so every exception is converted, not a list of them.

    Args:
        path: The file, for the message.
        error: Class of the error to raise.
        expected: Description of a correct file.
        remedy: Advice for the user.

    Raises:
        SatTrainError: `error`, or the one that was raised inside, unchanged.
    """
    try:
        yield
    except SatTrainError:
        raise
    except Exception as problem:
        raise error(f"{path}: {reason_of(problem)}", expected=expected, remedy=remedy) from problem


def reason_of(problem: Exception) -> str:
    """Returns an error in a few words on one line."""
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:200]}" if text else type(problem).__name__


@dataclass(frozen=True)
class FileRecord(JsonRecord):
    """Name, size and hash of a file.

    Args:
        name: File name inside its folder.
        size: Size in bytes.
        sha256: Hex digest of the contents.
    """

    name: str
    size: Count
    sha256: Sha256


class HashingFile:
    """A file that is written once, front to back; hashes its contents and keeps its first error.

    A large piece is hashed in a second thread while it is written. `torch.save` writes through C++, where an
    exception from `write` causes a second one that hides it. So `write` never raises, and `finish` does.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._digest = hashlib.sha256()
        self._error: OSError | None = None
        self._hashing = ThreadPoolExecutor(1)
        self.size = 0

    def write(self, data: Any) -> int:
        count = memoryview(data).nbytes
        if self._error is not None:
            return count
        self.size += count
        if count < _HASHED_APART:
            self._digest.update(data)
            self._write(data)
        else:  # both release the interpreter; the caller may reuse its buffer, so this waits for both
            hashed = self._hashing.submit(self._digest.update, data)
            self._write(data)
            hashed.result()
        return count

    def _write(self, data: Any) -> None:
        try:
            self._raw.write(data)
        except OSError as error:
            self._error = error

    def flush(self) -> None:
        """Does nothing: `finish` flushes and syncs."""

    def finish(self) -> str:
        """Syncs to disk and returns the SHA-256.

        Raises:
            OSError: The first error of any write, or of the sync.
        """
        self._hashing.shutdown()
        if self._error is not None:
            raise self._error
        self._raw.flush()
        os.fsync(self._raw.fileno())
        return self._digest.hexdigest()


def write_file(path: Path, write: Callable[[HashingFile], object], *, mode: int = 0o666) -> FileRecord:
    """Writes a file so that `path` is either complete and on disk, or unchanged.

    Args:
        path: Path of the file, in an existing folder.
        write: Writes the contents.
        mode: Permissions, before the umask.

    Raises:
        OSError: Disk full, no permission, I/O error. Nothing is left behind.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART_SUFFIX}")
    try:
        with os.fdopen(os.open(part, _NEW_FILE, mode), "wb", buffering=_CHUNK_BYTES) as raw:
            file = HashingFile(raw)
            write(file)
            sha256 = file.finish()
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return FileRecord(name=path.name, size=file.size, sha256=sha256)


def write_text(path: Path, text: str, *, mode: int = 0o666) -> FileRecord:
    """Writes a small text file as `write_file` does, and syncs its folder too."""

    def write(file: HashingFile) -> None:
        file.write(text.encode("utf-8"))

    record = write_file(path, write, mode=mode)
    sync_folder(path.parent)
    return record


def sync_folder(folder: Path) -> None:
    """Syncs a folder to disk, without which a power cut may lose a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a regular file's contents, read in chunks."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

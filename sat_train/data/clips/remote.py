"""Files on remote storage, through fsspec: their state, and reading parts of them."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from sat_train.data.clips.part_reader import PartReader
from sat_train.errors import DataError
from sat_train.patterns import expand_braces

if TYPE_CHECKING:
    from upath import UPath

_USER = re.compile(r"://[^/\s@'\"]*@")
_QUERY = re.compile(r"(https?://[^\s?'\"]*)\?[^\s'\")]+")
_HERE = ("file://", "local://")
_KEPT_BYTES = 16 << 20  # of the blocks of one open file
_WAITS_S = (0.2, 0.6, 1.8)  # pauses before a failed request is repeated
_RACY_NS = 2_000_000_000  # a file younger than this may change again within the same second
_BUSY = (408, 425, 429)  # statuses below 500 after which a retry may help
_GONE = (404, 410)
# Errors that a retry would meet again.
_LASTING = (PermissionError, ValueError, TypeError, LookupError, NotImplementedError, ImportError)
# Metadata that differs after each change of a file; keys in lower case and without dashes.
_CHANGES = {
    "etag",
    "contentmd5",
    "md5hash",
    "md5",
    "crc32c",
    "digest",
    "generation",
    "versionid",
    "blobid",
} | {
    *("lastmodified", "updated", "mtime", "modified", "modify", "modificationtime", "created"),
}

# File systems are kept here for good. If a forked worker dropped its parent's, that would wait for an event
# loop that runs only in the parent, to close the parent's connections.
_FILESYSTEMS: dict[int, Any] = {}

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteState:
    """State of a remote file.

    Args:
        size: Size in bytes.
        change: Differs whenever the object changes (from ETag, checksum or mtime); 0 if the storage reports
            none.
        mtime_ns: Time of the last change, if the storage reports only that, in whole seconds; else 0.
    """

    size: int
    change: int
    mtime_ns: int

    def shows_changes(self) -> bool:
        """Returns whether every later change will give another state."""
        return self.change != 0 and time.time_ns() - self.mtime_ns > _RACY_NS


def make_path(text: str) -> Path:
    """Returns the path of a name: local, or a `UPath` if it holds `://`.

    A `UPath` is a name here: what it stands for is asked of `read_state` and `RemoteFile`, which also work in
    a forked worker.

    Raises:
        DataError: It chains protocols, its protocol is unknown, or a package for it is missing.
    """
    here = next((head for head in _HERE if text.startswith(head)), "")
    if here or "://" not in text:
        return Path(text.removeprefix(here))
    if "::" in text:
        raise DataError(
            f"{public_url(text)}: chained protocols (`::`) are not read",
            expected="one protocol, such as s3://bucket/set",
        )
    try:
        import fsspec
        from upath import UPath
    except ImportError:
        raise DataError(
            f"{public_url(text)}: reading remote archives needs universal_pathlib",
            remedy="pip install universal_pathlib",
        ) from None
    protocol = text.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise DataError(
            f"{public_url(text)}: there is no protocol `{protocol}`", expected="s3://, gs://, https://, ..."
        ) from None
    except ImportError as error:
        package = _missing_package(protocol, error)
        raise DataError(
            f"{public_url(text)}: {protocol}:// needs {package}", remedy=f"pip install {package}"
        ) from None
    return cast(Path, UPath(text))


def _url(path: Path) -> UPath:
    """Returns the `UPath` that `make_path` made, typed; it behaves like a `Path` without being one."""
    return cast("UPath", path)


def _missing_package(protocol: str, error: ImportError) -> str:
    """Returns the package that provides a protocol, or that fsspec's own class for it fails to import."""
    from fsspec.registry import known_implementations

    package = known_implementations[protocol]["class"].partition(".")[0]
    return package if package != "fsspec" else getattr(error.__cause__, "name", None) or "fsspec[full]"


def is_remote(path: PurePath) -> bool:
    """Returns whether a path from `make_path` is remote."""
    return not isinstance(path, PurePath)


def public_url(text: PurePath | str) -> str:
    """Hides the passwords and signatures in a path, a URL, or a text with URLs."""
    return _QUERY.sub(r"\1?***", _USER.sub("://***@", str(text)))


def file_name(path: PurePath | str) -> str:
    """Returns the last part of a path or URL, without the query of a web address."""
    text = str(path)
    if text.startswith(("http://", "https://")):
        text = urlsplit(text).path
    return PurePosixPath(text).name


def find_remote(pattern: str) -> list[Path]:
    """Returns the archives that an item of the training data names, in its order.

    Names that are written out are not looked for here: reading them finds out, with many at once.

    Raises:
        DataError: Nothing matches a wildcard, a folder holds no archive, or the storage does not answer.
    """
    archives: list[Path] = []
    for url in expand_braces(pattern):
        magic = "*[" if url.startswith("http") else "*[?"
        if any(sign in url for sign in magic):
            archives += _glob(url)
        else:
            is_archive = file_name(url).endswith(".tar")
            archives += [make_path(url)] if is_archive else _glob(f"{url.rstrip('/')}/*.tar")
    return list(dict.fromkeys(archives))


def _glob(url: str) -> list[Path]:
    folder, below = _cut(url)
    path = make_path(folder)
    root = _url(path).path.rstrip("/")

    def ask() -> list[str]:
        names: list[str] = _filesystem(path).glob(f"{root}/{below}")
        _filesystem(path).invalidate_cache()  # the next question about a file is about its state then
        return names

    try:
        names = [name for name in _patiently(ask) if file_name(name).endswith(".tar")]
    except OSError as error:
        raise DataError(f"{public_url(url)}: its folder cannot be read: {error}") from None
    if not names:
        raise DataError(
            f"{public_url(url)}: there is no .tar archive at this place",
            expected="archives, or a folder of them: remote files are read from .tar archives only",
        )
    return [make_path(f"{folder}/{name[len(root) :].lstrip('/')}") for name in sorted(names)]


def _cut(url: str) -> tuple[str, str]:
    """Splits a URL before its first part with a wildcard."""
    protocol, _, rest = url.partition("://")
    parts = rest.split("/")
    at = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*[?"))
    return f"{protocol}://{'/'.join(parts[:at])}", "/".join(parts[at:])


def read_state(path: Path) -> RemoteState:
    """Reads the state of a remote file.

    Raises:
        FileNotFoundError: There is none.
        OSError: The storage does not answer, or does not tell the size.
    """
    info = _patiently(lambda: _filesystem(path).info(_url(path).path))
    if info.get("size") is None:
        raise OSError("the server does not report its size")
    metadata = {_plain(key): str(value) for key, value in info.items() if _plain(key) in _CHANGES and value}
    change = int(hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:12], 16)
    coarse = info.get("Last-Modified") if set(metadata) == {"lastmodified"} else None
    mtime_ns = int(parsedate_to_datetime(coarse).timestamp()) * 10**9 if coarse else 0
    return RemoteState(info["size"], change if metadata else 0, mtime_ns)


def _plain(key: str) -> str:
    return "".join(letter for letter in key.lower() if letter.isalnum())


class RemoteFile(PartReader):
    """A part of a remote file as a file, read in blocks; the last few blocks stay in memory.

    Args:
        path: The file, from `make_path`.
        block_bytes: Size of one request.
        start: Position of the part's first byte.
        size: Size of the part in bytes; None: to the end of the file.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: The storage does not answer, or does not support range requests.
    """

    def __init__(self, path: Path, *, block_bytes: int, start: int = 0, size: int | None = None) -> None:
        self._file, whole = _patiently(lambda: _open(path))
        super().__init__(max(0, whole - start if size is None else min(size, whole - start)))
        self._start = start
        self._block_bytes = block_bytes
        self._blocks: dict[int, bytes] = {}

    def read(self, size: int = -1) -> bytes:
        end = self._at + self._left(size)
        parts = []
        while self._at < end:
            number, skip = divmod(self._at, self._block_bytes)
            part = self._block(number)[skip : skip + end - self._at]
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            begin = number * self._block_bytes
            count = min(self._block_bytes, self._size - begin)
            block = _patiently(lambda: self._fetch(self._start + begin, count))
            if len(self._blocks) >= max(1, _KEPT_BYTES // self._block_bytes):
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = block
        return self._blocks[number]

    def _fetch(self, begin: int, count: int) -> bytes:
        self._file.seek(begin)
        data: bytes = self._file.read(count)
        if len(data) != count:
            raise OSError(f"{len(data)} of {count} bytes received")
        return data


def _open(path: Path) -> tuple[Any, int]:
    """Opens a remote file for exact reads, and returns it with its size."""
    file = _filesystem(path).open(_url(path).path, "rb", cache_type="none")
    if getattr(file, "size", 0) is None:
        raise OSError("the server does not report its size")
    file.seek(0, io.SEEK_END)
    return file, file.tell()


def _filesystem(path: Path) -> Any:
    """Returns the file system of this process; never the path's own, which a worker may have inherited."""
    import fsspec

    url = _url(path)
    filesystem = fsspec.filesystem(url.protocol, **url.storage_options)
    return _FILESYSTEMS.setdefault(id(filesystem), filesystem)


def _patiently(ask: Callable[[], Result]) -> Result:
    """Retries a call if the error may be temporary.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: Anything else; each storage has errors of its own.
    """
    for wait_s in (*_WAITS_S, None):
        try:
            return ask()
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, FileNotFoundError):
                raise cause from None
            if wait_s is None or not _may_pass(cause):
                raise OSError(public_url(f"{type(cause).__name__}: {cause}")) from error
            time.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def _cause(error: Exception) -> Exception:
    """Returns the real cause, since fsspec reports any error of a web server as a missing file."""
    inner = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(inner, Exception) and _status(inner) not in _GONE:
        return inner
    return error


def _status(error: Exception) -> int | None:
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _BUSY
    return not isinstance(error, _LASTING)

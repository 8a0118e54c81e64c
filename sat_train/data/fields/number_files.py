"""Numbers from .npy, .npz, .json and .txt files of strangers: a limit on everything, and no pickles."""

from __future__ import annotations

import io
import math
import zipfile
from typing import Any

import numpy as np

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import open_part, read_stamp
from sat_train.data.sources.records import FieldFile, parse_json
from sat_train.errors import DataError

_BINARY_BYTES = 256 << 20
_TEXT_BYTES = 32 << 20  # numbers as text become Python objects of many times their size
_MEMBERS = 1000  # of an .npz
_MAX_DIMS = 8
_HEADS = {b"\x93NUMPY": ".npy", b"PK": ".npz"}  # by which a file without a name is known
_KINDS = "biuf"  # truth values, integers, floats


def read_numbers(file: FieldFile, entry: str | None) -> np.ndarray:
    """Reads an array.

    Args:
        file: The file.
        entry: Name of the array in an .npz or .json file; None: the only one.

    Raises:
        BadClip: It is missing, too large, damaged, or holds anything but finite numbers.
    """
    limit = _TEXT_BYTES if file.suffix in (".json", ".txt") else _BINARY_BYTES
    content = read_field_bytes(file, limit=limit)
    kind = file.suffix or next((kind for head, kind in _HEADS.items() if content.startswith(head)), ".json")
    if kind == ".npy":
        return _checked(_parse_npy(content))
    if kind == ".npz":
        return _checked(_parse_npy(_member(content, entry)))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadClip("unreadable", f"it is not UTF-8 (byte {error.start})") from None
    return parse_numbers(text, entry) if kind == ".json" else _parse_lines(text)


def read_field_bytes(file: FieldFile, *, limit: int) -> bytes:
    """Reads a whole file, or a part of one.

    Raises:
        BadClip: It is missing, no regular file, too large, or its storage does not answer.
    """
    size = read_stamp(file.path)[0] if file.span is None else file.span.size
    if size > limit:
        raise BadClip("too large", f"it has {size:,} bytes, more than {limit:,}")
    try:
        with open_part(file.path, file.span) as opened:
            content = opened.read(size)
    except OSError as error:
        raise BadClip("unreadable", error.strerror or str(error)) from None
    if len(content) != size:
        raise BadClip("truncated", f"it gives {len(content):,} of {size:,} bytes")
    return content


def parse_numbers(text: str, entry: str | None) -> np.ndarray:
    """Returns the numbers of a JSON text: nested lists, or one entry of an object.

    Raises:
        BadClip: It holds something else.
    """
    try:
        content = parse_json(text)
    except DataError as error:
        raise BadClip("unreadable", error.problem) from None
    if isinstance(content, dict):
        content = content[_choose(entry, list(content))]
    _check_depth(content)
    try:
        numbers = np.array(content)
    except ValueError:
        raise BadClip("unreadable", "its lists have different lengths") from None
    return _checked(numbers)


def _check_depth(content: Any) -> None:
    """Refuses lists that are nested too deeply, of which numpy would make an array of lists."""
    for _ in range(_MAX_DIMS + 1):
        if not isinstance(content, list):
            return
        content = content[0] if content else None
    raise BadClip("unreadable", f"its lists are nested more than {_MAX_DIMS} deep")


def _parse_lines(text: str) -> np.ndarray:
    try:
        rows = [[float(word) for word in line.replace(",", " ").split()] for line in text.splitlines()]
    except ValueError as error:
        raise BadClip("unreadable", f"{error}; a row of numbers in each line is expected") from None
    rows = [row for row in rows if row]
    if len(set(map(len, rows))) > 1:
        raise BadClip("unreadable", "its lines have different numbers of numbers")
    return _checked(np.array(rows))


def _parse_npy(content: bytes) -> np.ndarray:
    """Parses an array whose header promises as many bytes as there are."""
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, is_fortran, dtype = read_header(file)
    except Exception as error:  # numpy fails in as many ways as there are broken headers
        raise BadClip("unreadable", f"its header is damaged ({type(error).__name__})") from None
    if dtype.kind not in _KINDS:
        raise BadClip("unreadable", f"it holds {dtype}, not numbers")
    left = len(content) - file.tell()
    if len(shape) > _MAX_DIMS or min(shape, default=1) < 0 or math.prod(shape) * dtype.itemsize != left:
        raise BadClip("unreadable", f"its header promises {dtype} {list(shape)}, {left:,} bytes follow")
    flat = np.frombuffer(content, dtype, offset=file.tell())
    return flat.reshape(shape[::-1]).T if is_fortran else flat.reshape(shape)


def _member(content: bytes, entry: str | None) -> bytes:
    """Returns one array of an .npz file, still as an .npy file."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()[:_MEMBERS]}
            name = _choose(entry, [name.removesuffix(".npy") for name in sizes])
            name = f"{name}.npy" if f"{name}.npy" in sizes else name
            if sizes[name] > _BINARY_BYTES:
                raise BadClip("too large", f"`{name}` has {sizes[name]:,} bytes, more than {_BINARY_BYTES:,}")
            with archive.open(name) as member:
                return member.read(sizes[name])
    except BadClip:
        raise
    except Exception as error:  # zipfile, zlib and lzma fail in as many ways as there are broken archives
        raise BadClip("unreadable", f"it is no .npz file ({type(error).__name__})") from None


def _choose(entry: str | None, names: list[str]) -> str:
    shown = ", ".join(names[:10]) or "nothing"
    if entry is not None and entry not in names:
        raise BadClip("missing", f"it has no entry `{entry}`, but {shown}")
    if entry is None and len(names) != 1:
        raise BadClip("unreadable", f"it holds {shown}: choose one with `entry`")
    return names[0] if entry is None else entry


def _checked(numbers: np.ndarray) -> np.ndarray:
    if numbers.dtype.kind not in _KINDS:
        raise BadClip("unreadable", "it holds other things than numbers")
    if not numbers.size:
        raise BadClip("unreadable", "it is empty")
    if not np.isfinite(numbers).all():
        raise BadClip("unreadable", "it holds numbers that are not finite")
    return numbers

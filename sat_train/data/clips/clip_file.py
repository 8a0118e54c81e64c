"""Opens a video or image file and reads its headers, without decoding."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import av
from av.container import InputContainer
from av.video.stream import VideoStream

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_times import DECODER_ERRORS, first_and_last
from sat_train.data.clips.orientation import Orientation, frame_orientation, read_exif
from sat_train.data.clips.part_reader import PartReader, ReadableFile
from sat_train.data.clips.remote import RemoteFile, is_remote, public_url, read_state
from sat_train.json_record import JsonRecord, PositiveFloat, PositiveInt

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".ogv", ".ts", ".webm", ".wmv"),
)
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# FFmpeg's names of the formats to open. None of them holds names of other files.
_VIDEO_FORMATS = "asf,avi,flv,gif,matroska,mov,mpeg,mpegts,ogg"
_IMAGE_FORMATS = "image2,bmp_pipe,jpeg_pipe,png_pipe,tiff_pipe,webp_pipe"
_RAW_FORMATS = "h264,hevc,m4v,mpegvideo"  # frames without times, which is reported later
_OPTIONS = {
    "format_whitelist": f"{_VIDEO_FORMATS},{_IMAGE_FORMATS},{_RAW_FORMATS}",
    "protocol_whitelist": "file",
    "pattern_type": "none",  # `%d` in the name of a picture does not stand for several files
}
READER = 2  # increase it when the same file gives another `ClipInfo`
_MAX_IMAGE_BYTES = 1 << 30
MAX_PIXELS = 1 << 26  # twice 8K; a header that claims more is an attack on memory or damage
# Of one request to remote storage: one for a small clip, a few for a window of a long one.
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class ClipInfo(JsonRecord):
    """Headers of a clip.

    Args:
        height: Height of the picture as stored; see `is_turned`.
        width: Width as stored, in square pixels.
        rate: Average frames per second.
        first: Time of the first frame, in seconds of the file's clock.
        last: Time of the last frame.
        codec: Name of the codec.
        is_image: Whether it is a single image.
        is_turned: Whether the picture is shown on its side; None: not known.
    """

    height: PositiveInt
    width: PositiveInt
    rate: PositiveFloat
    first: float
    last: float
    codec: str
    is_image: bool
    is_turned: bool | None = None

    @property
    def duration(self) -> float:
        """Time from the first frame to the end of the last, in seconds."""
        return self.last - self.first + 1 / self.rate

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width as shown, as far as they are known."""
        size = (self.height, self.width)
        return size[::-1] if self.is_turned else size


@dataclass(frozen=True)
class Span:
    """Byte range of a file inside another one, such as a member of a tar archive."""

    offset: int
    size: int


class _SpanReader(PartReader):
    """A part of a file on this machine."""

    def __init__(self, path: Path, span: Span) -> None:
        super().__init__(span.size)
        self._file = path.open("rb")
        self._offset = span.offset

    def read(self, size: int = -1) -> bytes:
        self._file.seek(self._offset + self._at)
        data = self._file.read(self._left(size))
        self._at += len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


class _RemoteReader(RemoteFile):
    """A part of a remote file; an error is the fault of this clip only, and may be temporary."""

    def read(self, size: int = -1) -> bytes:
        try:
            return super().read(size)
        except OSError as error:
            raise BadClip("unreadable", _message(error), may_pass=True) from None


_Reader = TypeVar("_Reader", bound=_RemoteReader)


class _QuietReader(_RemoteReader):
    """Reader that ends where reading fails, and keeps the error.

    PyAV holds exceptions from read callbacks until FFmpeg returns. When FFmpeg treats the failed read as end
    of file, the exception is lost, or raised later while another clip is being read.
    """

    error: BadClip | None = None

    def read(self, size: int = -1) -> bytes:
        if self.error is None:
            try:
                return super().read(size)
            except BadClip as error:
                self.error = error
        return b""


def open_part(path: Path, span: Span | None = None, *, block_bytes: int = _BLOCK_BYTES) -> ReadableFile:
    """Opens a file, or a part of one, for binary reading; each process opens it for itself.

    Args:
        path: The file.
        span: Part of it; None: all of it.
        block_bytes: Size of one request to remote storage.

    Raises:
        BadClip: It is remote, and missing or cannot be reached.
        OSError: It is not remote, and missing or cannot be read.
    """
    if not is_remote(path):
        return path.open("rb") if span is None else _SpanReader(path, span)
    return _open_remote(_RemoteReader, path, span, block_bytes)


def _open_remote(
    kind: type[_Reader], path: Path, span: Span | None, block_bytes: int = _BLOCK_BYTES
) -> _Reader:
    start, size = (0, None) if span is None else (span.offset, span.size)
    try:
        return kind(path, block_bytes=block_bytes, start=start, size=size)
    except FileNotFoundError:
        raise BadClip("missing", f"there is no {public_url(path)}") from None
    except OSError as error:
        raise BadClip("unreadable", _message(error), may_pass=True) from None


@contextmanager
def open_clip(
    path: Path, *, span: Span | None = None, timeout_s: float | None = None
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file and finds its video stream.

    Args:
        path: A remote path, or an absolute one, so that no part of it is taken for a protocol.
        span: Part of the file that holds the clip; None: all of it.
        timeout_s: Time after which a blocked read fails.

    Yields:
        The container and its first video stream that is not a cover picture.

    Raises:
        BadClip: The file is missing, empty, not a video, or has no decodable video stream; or its storage did
            not answer, which is raised at the end of the context at the latest.
    """
    assert is_remote(path) or path.is_absolute(), f"{path} must be absolute"
    remote = _open_remote(_QuietReader, path, span) if is_remote(path) else None
    if remote is None:
        _check_file(path)
    try:
        source = remote or (str(path) if span is None else _SpanReader(path, span))
        container = av.open(source, "r", timeout=timeout_s, options=_OPTIONS, metadata_errors="replace")
    except DECODER_ERRORS as error:
        _check_reader(remote)
        raise BadClip("unreadable", _message(error)) from None
    with container:
        try:
            yield container, _video_stream(container)
        except (BadClip, *DECODER_ERRORS):
            _check_reader(remote)
            raise
    _check_reader(remote)


def _check_reader(remote: _QuietReader | None) -> None:
    """Raises the error of the storage, whatever FFmpeg made of it."""
    if remote is not None and remote.error is not None:
        raise remote.error from None


def _check_file(path: Path) -> None:
    try:
        state = path.stat()
    except OSError as error:
        raise BadClip("missing", error.strerror or str(error)) from None
    if not stat.S_ISREG(state.st_mode):  # opening a pipe would wait for its writer
        raise BadClip("unreadable", "it is not a file")
    if path.suffix.lower() in IMAGE_SUFFIXES and state.st_size > _MAX_IMAGE_BYTES:  # FFmpeg reads it whole
        raise BadClip("too large", f"an image of {state.st_size:,} bytes")
    if state.st_size == 0:
        raise BadClip("unreadable", "the file is empty")


def _message(error: Exception) -> str:
    """Returns FFmpeg's message without its number and the path, which our message has already."""
    if isinstance(error, av.ArgumentError):  # FFmpeg's error for a format that is not on the list
        return "its format is not supported"
    return getattr(error, "strerror", None) or str(error)


def _video_stream(container: InputContainer) -> VideoStream:
    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise BadClip("no video", f"the file holds {kinds} only")
    stream = streams[0]
    if stream.codec_context is None:
        raise BadClip("unreadable", "there is no decoder for its video stream")
    if not stream.width or not stream.height:
        raise BadClip("unreadable", "its video stream has no picture size")
    if stream.width * stream.height > MAX_PIXELS:
        raise BadClip("too large", f"pictures of {stream.width}x{stream.height} pixels")
    return stream


def read_headers(
    path: Path, *, span: Span | None = None, with_turn: bool = False, timeout_s: float | None = None
) -> ClipInfo:
    """Opens a clip and reads its headers.

    Args:
        path: As for `open_clip`.
        span: Likewise.
        with_turn: Decode the first frame too, to find out whether the picture is shown on its side.
        timeout_s: Time after which a blocked read fails; None: never.

    Raises:
        BadClip: It is missing, empty, or not a video.
    """
    with open_clip(path, span=span, timeout_s=timeout_s) as (container, stream):
        info = read_info(container, stream)
        if not with_turn:
            return info
        if info.is_image:
            return replace(info, is_turned=read_orientation(path, span).is_transposed)
        return replace(info, is_turned=_is_turned(container, stream))


def read_info(container: InputContainer, stream: VideoStream) -> ClipInfo:
    """Reads the headers of an open clip.

    Raises:
        BadClip: There are no presentation times, the file is truncated, or the aspect ratio of its pixels
            makes the picture degenerate or too large.
    """
    width = round(stream.width * float(stream.sample_aspect_ratio or 1))
    if not 1 <= width * stream.height <= MAX_PIXELS:
        shape = f"{stream.width}x{stream.height} pixels of aspect {stream.sample_aspect_ratio}"
        raise BadClip("too large" if width else "unreadable", f"pictures of {shape}")
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    is_image = _is_image(container)
    first, last = (0.0, 0.0) if is_image else first_and_last(container, stream, rate)
    return ClipInfo(stream.height, width, rate, first, last, stream.codec_context.name, is_image)


def read_orientation(path: Path, span: Span | None = None) -> Orientation:
    """Returns the orientation of an image from its EXIF data."""
    with open_part(path, span) as file:
        return read_exif(file)


def _is_turned(container: InputContainer, stream: VideoStream) -> bool:
    """Returns whether a clip is shown on its side; decodes the first frame to find out.

    Raises:
        BadClip: It cannot be decoded.
    """
    stream.codec_context.thread_count = 1
    try:
        container.seek(min(0, stream.start_time or 0), stream=stream)
        return frame_orientation(next(container.decode(stream))).is_transposed
    except StopIteration:
        raise BadClip("damaged", "there is no frame that can be decoded") from None
    except DECODER_ERRORS as error:
        raise BadClip("damaged", f"decoding its first frame fails: {_message(error)}") from None


def _is_image(container: InputContainer) -> bool:
    name = container.format.name
    return name == "image2" or name.endswith("_pipe")


def read_stamp(path: Path) -> tuple[int, ...]:
    """Returns what tells one state of a file from others: size, mtime, ctime (ns) and inode.

    Of a remote file it is the size, a number for what its storage tells of the change, and the time of that
    where it may hide a second change. Zeros behind the size: nothing is known of changes.

    Raises:
        BadClip: The file is missing, or its storage does not answer.
    """
    if is_remote(path):
        return _remote_stamp(path)
    try:
        state = path.stat()
    except (OSError, ValueError) as error:  # a name with a NUL in it, from a stranger's list
        raise BadClip("missing", getattr(error, "strerror", None) or str(error)) from None
    if not stat.S_ISREG(state.st_mode):
        raise BadClip("unreadable", "it is not a regular file")
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def _remote_stamp(path: Path) -> tuple[int, ...]:
    try:
        state = read_state(path)
    except FileNotFoundError:
        raise BadClip("missing", f"there is no {path}") from None
    except OSError as error:
        raise BadClip("unreadable", str(error), may_pass=True) from None
    return state.size, state.change, state.mtime_ns

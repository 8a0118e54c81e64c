"""Opens a video or image file and says what is in it, without decoding."""

from __future__ import annotations

import itertools
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from sat_train.data.failures import BadClip
from sat_train.data.part_reader import PartReader
from sat_train.data.remote import RemoteFile, is_remote

VIDEO_SUFFIXES = (
    *(".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"),
    *(".mts", ".ogv", ".ts", ".webm", ".wmv"),
)
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DECODER_ERRORS = (av.FFmpegError, OSError, ValueError, ArithmeticError)  # the last two from absurd headers
_LISTS = ("concat", "dash", "hls", "webm_dash_manifest")  # names of formats that point at other files
UNINDEXED = ("avi", "mpeg")  # names of formats whose headers and seeking are off by some frames
_EDGE = 34  # index entries looked at: twice the frames that a codec reorders, and the gaps between them
MAX_PIXELS = 1 << 26  # twice 8K; a header that claims more is an attack on memory or damage
_BLOCK_BYTES = 1 << 20  # of one request to remote storage: a small clip is one, a window in a long one few


@dataclass(frozen=True)
class ClipInfo:
    """What a file's headers say.

    Args:
        height: Of the picture as stored. Only a decoded frame says whether it is to be turned.
        width: Likewise, counted in square pixels.
        rate: Average frames a second.
        first: When the first frame is shown, in seconds of the file's clock.
        last: When the last frame is shown.
        codec: Name of the codec.
        is_image: One still picture.
        quarter_turns: Counterclockwise turns after which the picture is shown; None: not looked at.
    """

    height: int
    width: int
    rate: float
    first: float
    last: float
    codec: str
    is_image: bool
    quarter_turns: int | None = None

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return self.last - self.first + 1 / self.rate

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width as shown, as far as is known."""
        size = (self.height, self.width)
        return size[::-1] if (self.quarter_turns or 0) % 2 else size


@dataclass(frozen=True)
class Span:
    """Bytes of a file that lies inside another one (a member of a tar archive)."""

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
    """A part of a remote file; what goes wrong on the way is the fault of this clip only, and may pass."""

    def read(self, size: int = -1) -> bytes:
        try:
            return super().read(size)
        except OSError as error:
            raise BadClip("unreadable", _said(error), may_pass=True) from None


class _QuietReader(_RemoteReader):
    """Ends where reading fails, and keeps the error.

    What a reader raises, PyAV keeps until FFmpeg is back, and loses or raises it while it reads another clip
    where FFmpeg takes the error for the end of the file.
    """

    error: BadClip | None = None

    def read(self, size: int = -1) -> bytes:
        if self.error is None:
            try:
                return super().read(size)
            except BadClip as error:
                self.error = error
        return b""


def open_part(path: Path, span: Span | None = None, *, block_bytes: int = _BLOCK_BYTES) -> IO[bytes]:
    """Opens a file, or a part of one, for reading in binary mode; in each process anew.

    Args:
        path: The file.
        span: Part of it; None: all of it.
        block_bytes: Bytes of one request to remote storage.

    Raises:
        BadClip: It is remote, and missing or cannot be reached.
        OSError: It is not remote, and missing or cannot be read.
    """
    if not is_remote(path):
        return path.open("rb") if span is None else _SpanReader(path, span)
    return _open_remote(_RemoteReader, path, span, block_bytes)


def _open_remote(
    kind: type[_RemoteReader], path: Path, span: Span | None, block_bytes: int = _BLOCK_BYTES
) -> _RemoteReader:
    start, size = (0, None) if span is None else (span.offset, span.size)
    try:
        return kind(path, block_bytes=block_bytes, start=start, size=size)
    except FileNotFoundError:
        raise BadClip("missing", f"there is no {path}") from None
    except OSError as error:
        raise BadClip("unreadable", _said(error), may_pass=True) from None


@contextmanager
def open_clip(
    path: Path, *, span: Span | None = None, timeout_s: float | None = None
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file and finds its video stream.

    Args:
        path: Must be absolute, so that nothing in it is taken for a protocol, or a remote path.
        span: Part of the file that holds the clip; None: all of it.
        timeout_s: Reading that blocks longer than this fails.

    Yields:
        The container and its first video stream that is not a cover picture.

    Raises:
        BadClip: The file is missing, empty, not a video, or has no decodable video stream; or its storage did
            not answer, which is said at the end of the context at the latest.
    """
    assert is_remote(path) or path.is_absolute(), f"{path} must be absolute"
    remote = _open_remote(_QuietReader, path, span) if is_remote(path) else None
    if remote is None:
        _check_file(path)
    try:
        source = remote or (str(path) if span is None else _SpanReader(path, span))
        container = av.open(
            source, timeout=timeout_s, options={"protocol_whitelist": "file"}, metadata_errors="replace"
        )
    except DECODER_ERRORS as error:
        _check_reader(remote)
        raise BadClip("unreadable", _said(error)) from None
    with container:
        try:
            yield container, _video_stream(container)
        except (BadClip, *DECODER_ERRORS):
            _check_reader(remote)
            raise
    _check_reader(remote)


def _check_reader(remote: _QuietReader | None) -> None:
    """Says that the storage failed, whatever came of it."""
    if remote is not None and remote.error is not None:
        raise remote.error from None


def _check_file(path: Path) -> None:
    try:
        state = path.stat()
    except OSError as error:
        raise BadClip("missing", error.strerror or str(error)) from None
    if not stat.S_ISREG(state.st_mode):  # to open a pipe is to wait for whoever writes to it
        raise BadClip("unreadable", "it is not a file")
    if state.st_size == 0:
        raise BadClip("unreadable", "the file is empty")


def _said(error: Exception) -> str:
    """FFmpeg's own words without its number and the path, which the message names anyway."""
    return getattr(error, "strerror", None) or str(error)


def _video_stream(container: InputContainer) -> VideoStream:
    cover = av.stream.Disposition.attached_pic
    if container.format.name in _LISTS:
        raise BadClip("unreadable", "it is a list of other files")
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
        raise BadClip("no video", f"the file holds {', '.join(kinds)} only")
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
        with_turn: Decode its first frame too, which alone says whether the picture is to be turned.
        timeout_s: Reading that blocks longer than this fails; None: never.

    Raises:
        BadClip: It is missing, empty, or no video.
    """
    with open_clip(path, span=span, timeout_s=timeout_s) as (container, stream):
        info = read_info(container, stream)
        return replace(info, quarter_turns=read_turn(container, stream)) if with_turn else info


def read_info(container: InputContainer, stream: VideoStream) -> ClipInfo:
    """Reads the headers.

    Raises:
        BadClip: There are no presentation times, or the file ends before its index says.
    """
    width = round(stream.width * float(stream.sample_aspect_ratio or 1))
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    is_image = _is_image(container)
    first, last = (0.0, 0.0) if is_image else _first_and_last(container, stream, rate)
    return ClipInfo(stream.height, width, rate, first, last, stream.codec_context.name, is_image)


def read_turn(container: InputContainer, stream: VideoStream) -> int:
    """Decodes the first frame, which says how often the picture is to be turned counterclockwise.

    Raises:
        BadClip: It cannot be decoded.
    """
    stream.codec_context.thread_count = 1
    try:
        if not _is_image(container):
            container.seek(min(0, stream.start_time or 0), stream=stream)
        return quarter_turns(next(container.decode(stream)))
    except StopIteration:
        raise BadClip("damaged", "there is no frame that can be decoded") from None
    except DECODER_ERRORS as error:
        raise BadClip("damaged", f"decoding its first frame fails: {_said(error)}") from None


def quarter_turns(frame: VideoFrame) -> int:
    """Returns how often a frame is to be turned counterclockwise (as numpy turns), 0 to 3."""
    return round(frame.rotation / 90) % 4


def _is_image(container: InputContainer) -> bool:
    name = container.format.name
    return name == "image2" or name.endswith("_pipe")


def _first_and_last(container: InputContainer, stream: VideoStream, rate: float) -> tuple[float, float]:
    """Returns when the first and the last frame are shown, from the headers where these can be trusted."""
    _check_complete(container, stream)
    if container.format.name in UNINDEXED:
        times = _packet_times(container, stream, tail=False)
    else:
        first = float((stream.start_time or 0) * stream.time_base)
        said = [first, max(first, first + float((stream.duration or 0) * stream.time_base) - 1 / rate)]
        if stream.duration and _is_even(container, stream, rate):
            return said[0], said[1]
        ends = _packet_times(container, stream, tail=True) or _packet_times(container, stream, tail=False)
        times = [first, *ends] if ends else said if stream.duration else []
    if not times:
        raise BadClip("no times", "its frames carry no presentation times (a raw stream?)")
    return min(times), max(times)


def _is_even(container: InputContainer, stream: VideoStream, rate: float) -> bool:
    """Whether all frames seem to last equally long, so that a file's length tells when its last one is shown.

    The length of an mp4 file is the sum of the times between decoded frames. Where these differ, reordering
    and the last frame's own duration put it off by up to some pauses. One pause among the last frames of an
    otherwise even file is not seen where reordering hides it; windows then end before it.
    """
    if "mp4" not in container.format.name:
        return container.format.name == "mpegts"  # whose length FFmpeg takes from its last packets itself
    entries = stream.index_entries
    if len(entries) < 2 or len(entries) != stream.frames:  # one of fragments knows only the first of them
        return False
    ends = (range(min(len(entries), _EDGE)), range(max(0, len(entries) - _EDGE), len(entries)))
    pace = 1 / (rate * float(stream.time_base))
    gaps = [b - a for end in ends for a, b in itertools.pairwise(entries[i].timestamp for i in end)]
    return all(abs(gap - pace) <= 1 for gap in gaps)


def _check_complete(container: InputContainer, stream: VideoStream) -> None:
    """An index that points past the end of the file is the mark of a copy that was broken off."""
    entries = stream.index_entries
    if container.size > 0 and len(entries):
        end = entries[-1].pos + entries[-1].size
        if end > container.size:
            raise BadClip("truncated", f"its index needs {end} bytes, the file has {container.size}")


def _packet_times(container: InputContainer, stream: VideoStream, *, tail: bool) -> list[float]:
    """Returns the presentation times of the file's packets, or of those behind its last keyframe."""
    try:
        end = container.duration if tail and container.duration else 0
        container.seek(end, backward=True)
        return [float(p.pts * p.time_base) for p in container.demux(stream) if _is_shown(p)]
    except DECODER_ERRORS:
        return []


def _is_shown(packet: Packet) -> bool:
    """Whether its frame has a time, and an edit list does not cut it off."""
    return packet.pts is not None and not packet.is_discard

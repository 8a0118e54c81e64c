"""Finds the times of the first and last frame of a clip, from headers if they can be trusted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TypeAlias

import av
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from sat_train.data.clips.bad_clip import BadClip

VideoPacket: TypeAlias = "Packet[VideoStream]"
DECODER_ERRORS = (av.FFmpegError, OSError, ValueError, ArithmeticError)  # the last two from absurd headers
_EDGE = 34  # index entries to inspect: twice the frames that a codec reorders, and the gaps between them
_TAIL_S = 3.0  # end of a program stream to read for its last frame: time stamps are at most 0.7 s apart
_SETTLED_S = 1.0
HEADER_ROUNDING_S = 1.5e-3  # mp4 and mkv give a file's length in milliseconds
_REORDERED = ("h264", "hevc")  # codecs whose slots in AVI do not give presentation times
MAX_SECONDS = 7 * 24 * 3600.0  # a clip that claims more would be split into endless samples


def time_base(stream: VideoStream) -> Fraction:
    """Returns the unit of a stream's time stamps in seconds; every stream of an open file has one."""
    assert stream.time_base is not None, "a stream without a unit of time"
    return stream.time_base


def is_avi(container: InputContainer) -> bool:
    """Returns whether packets carry their slot at the file's constant rate instead of presentation times."""
    return container.format.name == "avi"


def is_program_stream(container: InputContainer) -> bool:
    """Returns whether the times of a few packets after each seek are guesses, until the next time stamps."""
    return container.format.name == "mpeg"


def first_and_last(container: InputContainer, stream: VideoStream, rate: float) -> tuple[float, float]:
    """Returns the times of the first and the last frame that can be decoded, on the file's clock.

    Args:
        container: A container that was just opened and not yet read.
        stream: Its video stream.
        rate: Average frames per second.

    Raises:
        BadClip: There are no presentation times, or the file is truncated.
    """
    _check_complete(container, stream)
    if is_avi(container):
        first, last = _slots(container, stream)
    elif is_program_stream(container):
        first, last = _first(container, stream), _last_of_program_stream(container, stream)
    else:
        first, last = _first(container, stream), _last(container, stream, rate)
    if last - first > MAX_SECONDS:
        raise BadClip("too large", f"it claims to last {last - first:.0f} s")
    return first, max(first, last)


def _check_complete(container: InputContainer, stream: VideoStream) -> None:
    """Refuses an index that points past the end of the file, the sign of an incomplete copy."""
    entries = stream.index_entries
    if container.size > 0 and len(entries):
        end = entries[-1].pos + entries[-1].size
        if end > container.size:
            raise BadClip("truncated", f"its index needs {end} bytes, the file has {container.size}")


def _first(container: InputContainer, stream: VideoStream) -> float:
    """Returns the time of the first keyframe; a recording may begin between keyframes."""
    start = float((stream.start_time or 0) * time_base(stream))
    entries = stream.index_entries
    if "mp4" in container.format.name and len(entries) and entries[0].is_keyframe:
        return start
    try:
        for packet in container.demux(stream):  # FFmpeg has already read the first ones to find the codec
            if packet.is_keyframe and (times := _shown_times([packet])):
                return max(start, *times)
    except DECODER_ERRORS:
        pass  # reported when that part is read
    return start


def _last(container: InputContainer, stream: VideoStream, rate: float) -> float:
    start = float((stream.start_time or 0) * time_base(stream))
    end = max(start, start + float((stream.duration or 0) * time_base(stream)) - 1 / rate)
    if stream.duration and _is_even(container, stream, rate):
        return end
    times = _packet_times(container, stream, tail=True) or _packet_times(container, stream, tail=False)
    if not times and not stream.duration:
        raise _no_times()
    return max(times, default=end)


def _is_even(container: InputContainer, stream: VideoStream, rate: float) -> bool:
    """Returns whether all frames seem to last equally long, so that the file's length gives the last frame's
    time.

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
    pace = 1 / (rate * float(time_base(stream)))
    gaps = [b - a for end in ends for a, b in itertools.pairwise(entries[i].timestamp for i in end)]
    return all(abs(gap - pace) <= 1 for gap in gaps)


def _packet_times(container: InputContainer, stream: VideoStream, *, tail: bool) -> list[float]:
    """Returns the presentation times of the file's packets, or of those after its last keyframe."""
    try:
        end = container.duration if tail and container.duration else 0
        container.seek(end, backward=True)
        return _shown_times(container.demux(stream))
    except DECODER_ERRORS:
        return []


def _last_of_program_stream(container: InputContainer, stream: VideoStream) -> float:
    """Reads the end of the file, and more of it until it holds packets with reliable times."""
    start = container.start_time or 0
    length = (container.duration or 0) / av.time_base
    back = _TAIL_S
    while True:
        at_start = back >= length
        try:
            container.seek(start if at_start else int(start + (length - back) * av.time_base))
            times = _shown_times(settled(container.demux(stream), from_start=at_start))
        except DECODER_ERRORS:
            times = []
        if times:
            return max(times)
        if at_start:
            raise _no_times()
        back *= 4


def settled(packets: Iterable[VideoPacket], *, from_start: bool) -> Iterator[VideoPacket]:
    """Yields the packets of a program stream, without those after a seek whose times are guesses.

    A seek ends inside a frame, whose rest is taken for a frame. Times are right from the next time stamp on:
    at the latest in the third block and a second later.
    """
    blocks: set[int | None] = set()
    begin = None
    for packet in packets:
        if not from_start and packet.dts is not None:
            blocks.add(packet.pos)
            begin = packet.dts if begin is None else begin
            from_start = len(blocks) > 2 and (packet.dts - begin) * packet.time_base > _SETTLED_S
        if from_start:
            yield packet


def _slots(container: InputContainer, stream: VideoStream) -> tuple[float, float]:
    """Returns the slots of an AVI file's index, each of which shows one frame; a keyframe comes first."""
    if stream.codec_context.name in _REORDERED and stream.codec_context.has_b_frames:
        raise BadClip("no times", "AVI does not store the order of H.264's or HEVC's B-frames")
    slots = [(entry.timestamp, entry.is_keyframe) for entry in stream.index_entries]
    if len(slots) < 2:
        slots = [(p.dts, p.is_keyframe) for p in container.demux(stream) if p.dts is not None and p.size]
    if not slots:
        raise _no_times()
    first = next((slot for slot, is_keyframe in slots if is_keyframe), slots[0][0])
    return float(first * time_base(stream)), float(slots[-1][0] * time_base(stream))


def _shown_times(packets: Iterable[VideoPacket]) -> list[float]:
    """Returns the times of the frames that have one and are not cut off by an edit list."""
    return [float(p.pts * p.time_base) for p in packets if p.pts is not None and not p.is_discard]


def _no_times() -> BadClip:
    return BadClip("no times", "its frames carry no presentation times (a raw stream?)")

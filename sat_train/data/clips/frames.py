"""Reads frames of a clip by presentation time, decoding and scaling only those needed."""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.clips.clip_file import Span, open_clip, read_info, read_orientation
from sat_train.data.clips.clip_times import (
    DECODER_ERRORS,
    VideoPacket,
    is_avi,
    is_program_stream,
    settled,
    time_base,
)
from sat_train.data.clips.orientation import Orientation
from sat_train.data.clips.resize import CoverCrop
from sat_train.data.clips.shaper import Shaper

_REORDER = 33  # packets to read past the window without decode times: more than any codec reorders
# Decoders that obey `skip_frame` packet by packet. Not mpeg4, where one packet may hold two frames.
_SPARING = ("h264", "hevc", "mpeg2video", "vp9")
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders of these ignore transparency


@dataclass(frozen=True)
class Frames:
    """Frames of a clip with their times.

    Args:
        video_thwc: uint8 RGB.
        times: Time of each frame, in seconds from the clip's first frame.
        crop: How they were scaled and cropped.
    """

    video_thwc: np.ndarray
    times: tuple[float, ...]
    crop: CoverCrop


@contextmanager
def open_frames(
    path: Path, *, span: Span | None = None, timeout_s: float | None = None
) -> Iterator[FrameReader]:
    """Opens a clip for reading frames.

    Args:
        path: As for `open_clip`.
        span: Likewise.
        timeout_s: Time from now on after which the clip is abandoned; None: never.

    Raises:
        BadClip: It is missing or not a video, or reading it fails.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with open_clip(path, span=span, timeout_s=timeout_s) as (container, stream):
        reader = FrameReader(container, stream, deadline=deadline)
        if reader.info.is_image:
            reader.orientation = read_orientation(path, span)
        yield reader


class FrameReader:
    """Reads frames of one open clip.

    Args:
        container: From `open_clip`.
        stream: Likewise.
        deadline: `time.monotonic()` at which the clip is abandoned; None: never.
    """

    def __init__(
        self, container: InputContainer, stream: VideoStream, *, deadline: float | None = None
    ) -> None:
        self._container = container
        self._stream = stream
        self._deadline = deadline
        self._tick = float(time_base(stream))
        self._stamps: Sequence[int] | None = None
        self.info = read_info(container, stream)
        self.orientation: Orientation | None = None  # of an image; a video's frames carry their own
        self._context = _decoder(stream)
        self._context.thread_count = 1  # many workers decode in parallel; one thread each is fastest

    def read(
        self,
        targets: Sequence[float],
        choose_crop: Callable[[int, int], CoverCrop],
        *,
        nearest_pixel: bool = False,
    ) -> Frames:
        """Reads the frame nearest to each time.

        Args:
            targets: Times in seconds of the file's clock, ascending.
            choose_crop: Returns the crop for a picture's height and width as shown; called once.
            nearest_pixel: Scale without mixing colours, as masks need it.

        Raises:
            BadClip: The file is damaged or ends inside the window, or `choose_crop` refuses its size.
        """
        size = (self.info.height, self.info.width)
        shape = Shaper(size, choose_crop, self.orientation, nearest=nearest_pixel)
        nearest = self._nearest_slots if is_avi(self._container) else self._nearest
        pictures = list(nearest(targets, shape))
        times = tuple(moment - self.info.first for moment, _ in pictures)
        assert shape.crop is not None, "at least one frame was read"
        return Frames(np.stack([picture for _, picture in pictures]), times, shape.crop)

    def number_at(self, moment: float) -> int:
        """Returns the index in its file of the frame nearest to a time.

        Args:
            moment: Seconds from the clip's first frame, which is number 0.

        Raises:
            BadClip: The file cannot be read to its end.
        """
        if self.info.is_image:
            return 0
        if self._stamps is None:
            self._stamps = self._even_stamps() or self._all_stamps()
        return _nearest_index(self._stamps, (self.info.first + moment) / self._tick)

    def _even_stamps(self) -> Sequence[int]:
        """Returns the time stamps of all frames, if the index shows that all last equally long."""
        entries = [entry.timestamp for entry in self._stream.index_entries]
        gaps = {after - before for before, after in itertools.pairwise(entries)}
        is_whole = "mp4" in self._container.format.name and len(entries) == self._stream.frames
        if is_avi(self._container):
            gaps = {1}
        elif not is_whole or len(gaps) != 1:
            return ()
        first, last = (round(moment / self._tick) for moment in (self.info.first, self.info.last))
        return range(first, last + 1, gaps.pop())

    def _all_stamps(self) -> Sequence[int]:
        """Reads the time stamps of all frames from the packets of the file."""
        self._seek(self.info.first)
        stamps = sorted(p.pts for p in self._packets() if p.pts is not None and not p.is_discard)
        first = round(self.info.first / self._tick)
        return [stamp for stamp in stamps if stamp >= first] or [first]

    def _nearest(
        self, targets: Sequence[float], shape: Callable[[VideoFrame], np.ndarray]
    ) -> Iterator[tuple[float, np.ndarray]]:
        """Yields time and picture of the frame nearest to each target."""
        packets = self._window(targets[0], targets[-1])
        stamps = sorted({packet.pts for packet in packets if packet.pts is not None})
        if not stamps:
            raise BadClip("truncated", f"there are no frames at {targets[0]:.2f} s")
        chosen = [_nearest_index(stamps, target / self._tick) for target in targets]
        needed = [stamps[i] for i in chosen]
        self._check_end(packets, stamps[-1], targets[-1])
        waiting = iter(needed)
        pts, before = next(waiting), -math.inf
        for frame in self._decode(iter(packets), needed=set(needed)):
            if frame.pts is None or frame.pts <= before:
                raise BadClip("no times", "its frames are not in the order of their times")
            before = frame.pts
            if frame.pts < pts:
                continue
            if frame.pts > pts:
                break
            picture = shape(frame)
            while pts == frame.pts:
                yield pts * self._tick, picture
                following = next(waiting, None)
                if following is None:
                    return
                pts = following
        raise BadClip("damaged", f"the frame at {pts * self._tick:.3f} s cannot be decoded")

    def _nearest_slots(
        self, targets: Sequence[float], shape: Callable[[VideoFrame], np.ndarray]
    ) -> Iterator[tuple[float, np.ndarray]]:
        """Does the same as `_nearest` for an AVI file, which shows a frame in the slot of the packet that
        outputs it.

        FFmpeg's times of these packets are guesses, and wrong for packed B-frames. Frames come in display
        order, so the nearest one is one of the two around a target; all frames are decoded.
        """
        slots = self._slots_from(targets[0])
        before, after = None, next(slots, None)
        for target in targets:
            while after is not None and after[0] * self._tick < target:
                before, after = after, next(slots, None)
            if after is None and before is not None and target > (before[0] + 1) * self._tick + 1e-6:
                raise self._ended((before[0] + 1) * self._tick, target)
            around = [slot for slot in (before, after) if slot is not None]
            if not around:
                raise BadClip("truncated", f"there are no frames at {target:.2f} s")
            slot, frame = min(around, key=lambda slot: abs(slot[0] * self._tick - target))
            yield slot * self._tick, shape(frame)

    def _slots_from(self, moment: float) -> Iterator[tuple[int, VideoFrame]]:
        """Yields slots and frames; the first is at or before a time, unless it is the first of the file."""
        back = 0.0
        while True:
            begin = max(self.info.first, moment - back)
            self._seek(begin)
            frames = self._slotted()
            first = next(frames, None)
            if begin <= self.info.first or (first is not None and first[0] * self._tick <= moment):
                break
            back = max(1.0, 2 * back)
        if first is not None:
            yield first
            yield from frames

    def _slotted(self) -> Iterator[tuple[int, VideoFrame]]:
        delay = int(self._context.has_b_frames)
        before = -math.inf
        for frame in self._decode(self._packets(), needed=None):
            slot = before + 1 if frame.dts is None else max(frame.dts - delay, before + 1)
            before = slot
            yield int(slot), frame

    def _check_end(self, packets: list[VideoPacket], last: int, target: float) -> None:
        """Refuses a window that reaches past the end of the last frame, which means that the file is
        truncated.
        """
        duration = max((packet.duration or 0) for packet in packets if packet.pts == last)
        end = last * self._tick + max(duration * self._tick, 1 / self.info.rate)
        if target > end + 1e-6:
            raise self._ended(end, target)

    @staticmethod
    def _ended(end: float, target: float) -> BadClip:
        return BadClip(
            "truncated", f"its last frame ends at {end:.2f} s, but its header promises {target:.2f} s"
        )

    def _window(self, first: float, last: float) -> list[VideoPacket]:
        """Reads the packets from the keyframe at or before `first` up to the frames around `last`."""
        start = self.info.first
        is_guessed = is_program_stream(self._container)
        back = 3.0 if is_guessed else 0.0
        while True:
            at_start = self.info.is_image or first - back <= start  # an image has only one packet
            if not self.info.is_image:  # seeking fails in large images
                self._seek(max(first - back, start))
            packets: Iterator[VideoPacket] = self._packets()
            if is_guessed:
                packets = settled(packets, from_start=at_start)
            window = self._until(packets, first, last)
            begin = window[0].pts if window and window[0].is_keyframe else None
            if at_start or (begin is not None and begin * self._tick <= first):
                return window
            back = max(1.0, 2 * back)

    def _seek(self, moment: float) -> None:
        try:
            if moment <= self.info.first:
                self._container.seek(min(0, self._stream.start_time or 0), stream=self._stream)
            else:
                self._container.seek(int(moment / self._tick), stream=self._stream)
        except DECODER_ERRORS as error:
            raise BadClip("damaged", f"seeking to {moment:.2f} s fails: {error}") from None

    def _packets(self) -> Iterator[VideoPacket]:
        try:
            for packet in self._container.demux(self._stream):
                self._check_deadline()
                if (
                    packet.dts is not None or packet.pts is not None
                ):  # otherwise it is the empty packet at the end
                    yield packet
        except DECODER_ERRORS as error:
            raise BadClip("damaged", f"reading fails: {error}") from None

    def _until(self, packets: Iterator[VideoPacket], first: float, last: float) -> list[VideoPacket]:
        """Returns the packets from the last keyframe at or before `first`, if there is one, until no later
        packet can be nearer to `last`.
        """
        window: list[VideoPacket] = []
        after: int | None = None  # earliest frame at or after `last`
        past = 0
        for packet in packets:
            if packet.pts is None:
                continue
            if after is not None:
                past += 1
                if packet.dts >= after if packet.dts is not None else past > _REORDER:
                    break
            elif packet.is_keyframe and packet.pts * self._tick <= first:
                window.clear()
            window.append(packet)
            if packet.pts * self._tick >= last:
                after = packet.pts if after is None else min(after, packet.pts)
        return window

    def _decode(self, packets: Iterator[VideoPacket], *, needed: set[int] | None) -> Iterator[VideoFrame]:
        """Decodes packets in order.

        Args:
            needed: Presentation times of the frames that are needed; None: all. Other frames are decoded only
                if these refer to them.
        """
        context = self._context
        try:
            for packet in packets:
                is_spared = needed is not None and packet.pts not in needed and context.name in _SPARING
                context.skip_frame = "NONREF" if is_spared else "DEFAULT"
                yield from self._whole(context.decode(packet))
            context.skip_frame = "DEFAULT"
            yield from self._whole(context.decode(None))
        except DECODER_ERRORS as error:
            raise BadClip("damaged", f"decoding fails: {error}") from None
        finally:
            context.flush_buffers()

    def _whole(self, frames: list[VideoFrame]) -> Iterator[VideoFrame]:
        for frame in frames:
            self._check_deadline()
            if frame.is_corrupt:
                raise BadClip("damaged", f"the frame at {frame.time or 0:.3f} s is corrupt")
            yield frame

    def _check_deadline(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise BadClip("timeout", "decoding takes longer than data.worker_timeout_s")


def _nearest_index(values: Sequence[int], target: float) -> int:
    """Returns the index of the value nearest to `target` in a sorted list; of two, the earlier one."""
    right = bisect.bisect_left(values, target)
    if right == 0:
        return 0
    if right == len(values):
        return right - 1
    return right - 1 if target - values[right - 1] <= values[right] - target else right


def _decoder(stream: VideoStream) -> VideoCodecContext:
    """Returns the stream's decoder, or one that also decodes its transparency.

    Raises:
        BadClip: This FFmpeg has none for it.
    """
    own = stream.codec_context
    tags = {name.lower(): value for name, value in stream.metadata.items()}
    if tags.get("alpha_mode") != "1" or own.name not in _WITH_ALPHA:
        return own
    name = _WITH_ALPHA[own.name]
    if name not in av.codecs_available:
        raise BadClip("unreadable", f"its transparent pixels need FFmpeg's decoder {name}")
    context = av.CodecContext.create(name, "r")
    assert isinstance(context, VideoCodecContext), f"{name} decodes video"
    context.extradata = own.extradata
    return context

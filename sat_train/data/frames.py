"""Frames of a clip by presentation time, decoding and scaling only what is needed."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from sat_train.data.clip_file import DECODER_ERRORS, UNINDEXED, ClipInfo, quarter_turns, read_info
from sat_train.data.failures import BadClip
from sat_train.data.resize import CoverCrop

_REORDER = 33  # packets to read past the window where decode times are unknown: more than any codec reorders
_SPARING = ("h264", "hevc", "mpeg4", "mpeg2video", "vp9")  # decoders that obey `skip_frame` packet by packet


@dataclass(frozen=True)
class Frames:
    """What was read.

    Args:
        video_thwc: uint8 RGB.
        times: When each frame is shown, in seconds from the clip's first frame.
    """

    video_thwc: np.ndarray
    times: tuple[float, ...]


class FrameReader:
    """Reads frames of one open clip.

    Args:
        container: From `open_clip`.
        stream: Likewise.
        deadline: `time.monotonic()` after which the clip is given up; None: never.
    """

    def __init__(
        self, container: InputContainer, stream: VideoStream, *, deadline: float | None = None
    ) -> None:
        self._container = container
        self._stream = stream
        self._deadline = deadline
        self._tick = float(stream.time_base)
        stream.codec_context.thread_count = 1  # many workers decode side by side; one thread each is fastest
        self.info = read_info(container, stream)

    def read(self, targets: Sequence[float], plan: Callable[[int, int], CoverCrop]) -> Frames:
        """Reads the frame nearest to each moment.

        Args:
            targets: Moments in seconds of the file's clock, rising.
            plan: Gives scaling and cropping for a picture's height and width as shown; asked once.

        Raises:
            BadClip: The file is damaged or ends inside the window, or `plan` refuses its size.
        """
        found = list(self._nearest(targets, _Shaper(self.info, plan)))
        times = tuple(moment - self.info.first for moment, _ in found)
        return Frames(np.stack([picture for _, picture in found]), times)

    def _nearest(
        self, targets: Sequence[float], shape: Callable[[VideoFrame], np.ndarray]
    ) -> Iterator[tuple[float, np.ndarray]]:
        """Yields time and picture of the frame nearest to each target."""
        packets = self._window(targets[0], targets[-1])
        shown = sorted({packet.pts for packet in packets if packet.pts is not None})
        if not shown:
            raise BadClip("truncated", f"there are no frames at {targets[0]:.2f} s")
        chosen = [_nearest_index(shown, target / self._tick) for target in targets]
        wanted = [shown[i] for i in chosen]
        self._check_end(packets, shown[-1], targets[-1])
        waiting = iter(wanted)
        pts, before = next(waiting), -math.inf
        for frame in self._decode(iter(packets), wanted=set(wanted)):
            if frame.pts is None or frame.pts <= before:
                raise BadClip("no times", "its frames come in another order than their times say")
            before = frame.pts
            if frame.pts < pts:
                continue
            if frame.pts > pts:
                break
            picture = shape(frame)
            while pts == frame.pts:
                yield pts * self._tick, picture
                pts = next(waiting, None)
            if pts is None:
                return
        raise BadClip("damaged", f"the frame at {pts * self._tick:.3f} s cannot be decoded")

    def _check_end(self, packets: list[Packet], last: int, target: float) -> None:
        """A window that reaches past the last frame's own duration means that the file is cut off."""
        held = max((packet.duration or 0) for packet in packets if packet.pts == last)
        end = last * self._tick + max(held * self._tick, 1 / self.info.rate)
        if target > end + 1e-6:
            raise BadClip(
                "truncated", f"its last frame ends at {end:.2f} s, its header promises {target:.2f} s"
            )

    def _window(self, first: float, last: float) -> list[Packet]:
        """Reads the packets from the keyframe at or before `first` up to the frames around `last`."""
        if self.info.is_image:  # it stands at its only packet, and large ones cannot be sought
            return self._packets_until(last)
        start, back = self.info.first, 0.0
        if self._container.format.name in UNINDEXED:
            back = math.inf  # from the beginning
        while True:
            moment = max(first - back, start)
            self._seek(moment)
            packets = self._packets_until(last)
            begins = next((p.pts for p in packets if p.is_keyframe and p.pts is not None), None)
            if moment <= start or (begins is not None and begins * self._tick <= first):
                return packets
            back = max(1.0, 2 * back)

    def _seek(self, moment: float) -> None:
        try:
            if moment <= self.info.first:
                self._container.seek(min(0, self._stream.start_time or 0), stream=self._stream)
            else:
                self._container.seek(int(moment / self._tick), stream=self._stream)
        except DECODER_ERRORS as error:
            raise BadClip("damaged", f"seeking to {moment:.2f} s fails: {error}") from None

    def _packets_until(self, last: float) -> list[Packet]:
        """Reads packets until no later one can be nearer to `last`."""
        packets: list[Packet] = []
        after: int | None = None  # earliest frame at or after `last`
        past = 0
        try:
            for packet in self._container.demux(self._stream):
                if packet.pts is None:
                    continue
                if after is not None:
                    past += 1
                    if packet.dts >= after if packet.dts is not None else past > _REORDER:
                        break
                packets.append(packet)
                if packet.pts * self._tick >= last:
                    after = packet.pts if after is None else min(after, packet.pts)
                self._check_deadline()
        except DECODER_ERRORS as error:
            raise BadClip("damaged", f"reading fails: {error}") from None
        return packets

    def _decode(self, packets: Iterator[Packet], *, wanted: set[int]) -> Iterator[VideoFrame]:
        """Decodes packets in order.

        Args:
            wanted: Presentation times of the frames that are needed. Others are decoded only where
                these refer to them.
        """
        context = self._stream.codec_context
        try:
            for packet in packets:
                is_spared = packet.pts not in wanted and context.name in _SPARING
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


class _Shaper:
    """Turns, scales and cuts the frames of one clip, all in the same way."""

    def __init__(self, info: ClipInfo, plan: Callable[[int, int], CoverCrop]) -> None:
        self._info = info
        self._make_plan = plan
        self._plan: CoverCrop | None = None
        self._quarter_turns = 0
        self._scaler, self._converter = VideoReformatter(), VideoReformatter()  # they keep their tables

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """Returns the picture, uint8 RGB `[height, width, 3]`."""
        if self._plan is None:
            self._quarter_turns = quarter_turns(frame)
            size = (self._info.height, self._info.width)
            self._plan = self._make_plan(*(size[::-1] if self._quarter_turns % 2 else size))
        plan = self._plan
        size = (plan.scaled_height, plan.scaled_width)
        height, width = size[::-1] if self._quarter_turns % 2 else size
        picture = np.rot90(self._scaled(frame, height, width), self._quarter_turns)
        return picture[plan.top : plan.top + plan.height, plan.left : plan.left + plan.width]

    def _scaled(self, frame: VideoFrame, height: int, width: int) -> np.ndarray:
        """Scales and turns into RGB.

        YUV is scaled as it is, at full colour resolution, and turned into RGB after that: twice as fast as
        FFmpeg's way in one step, and without its darkening by one or two levels.
        """
        has_alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
        if frame.format.is_rgb or has_alpha:
            return self._scaled_rgb(frame, height, width, has_alpha)
        plain = self._scaler.reformat(
            frame, width=width, height=height, format="yuv444p", interpolation="BICUBIC", threads=1
        )
        return self._converter.reformat(plain, format="rgb24", threads=1).to_ndarray()

    def _scaled_rgb(self, frame: VideoFrame, height: int, width: int, has_alpha: bool) -> np.ndarray:
        form = "rgba" if has_alpha else "rgb24"
        picture = self._scaler.reformat(
            frame, width=width, height=height, format=form, interpolation="BICUBIC", threads=1
        ).to_ndarray()
        if not has_alpha:
            return picture
        opacity = picture[..., 3:] / 255.0  # over black: what lies under a transparent pixel is arbitrary
        return (picture[..., :3] * opacity + 0.5).astype(np.uint8)


def _nearest_index(values: list[int], target: float) -> int:
    """Returns the index of the value nearest to `target` in a rising list; the earlier one of two."""
    right = bisect.bisect_left(values, target)
    if right == 0:
        return 0
    if right == len(values):
        return right - 1
    return right - 1 if target - values[right - 1] <= values[right] - target else right

"""Maps a global sample index to a sample: clip, window and caption."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.data import Dataset

from sat_train.config.shapes import ClipShape
from sat_train.data.batches import SampleBatch, VideoSample
from sat_train.data.buckets import BucketAssignment, SampleSpec
from sat_train.data.clips.bad_clip import BadClip, one_clip
from sat_train.data.clips.clip_file import ClipInfo, read_stamp
from sat_train.data.clips.frames import Frames, open_frames
from sat_train.data.clips.resize import CoverCrop, cover_crop
from sat_train.data.failure_log import ClipFailure
from sat_train.data.fields.pictures import to_tensor
from sat_train.data.fields.reader import FieldReader, SampleGeometry, read_fields, repeat_last
from sat_train.data.sampler import AugmentationKey, ClipRef, GlobalOrder, limited_augmentation_key
from sat_train.data.sources.records import ClipRecord, ClipSource
from sat_train.data.window import Window, fit_frames, usable_part, window_start
from sat_train.distributed.seeds import derive_seed
from sat_train.errors import DataError

_SUBSTITUTES = 32  # clips to try for a sample before the set itself must be broken
_DRAWS = 1024  # of other samples, for those in the same bucket


T = TypeVar("T")


@dataclass(frozen=True)
class SampleResult(Generic[T]):
    """A sample, and the clips that failed before it."""

    sample: T
    failures: tuple[ClipFailure, ...]


class VideoDataset(Dataset[SampleResult[VideoSample]]):
    """Samples by global index; an index gives the same sample on any rank, worker and restart.

    Args:
        sources: Sources of clips.
        order: Maps samples to clips.
        buckets: The shape of each clip's samples.
        spec: Shape and rate of the samples.
        seed: The run's seed: key of windows, choice of captions and substitutes.
        timeout_s: Time after which decoding a clip is abandoned; None: never.
        fields: Readers of the fields (`data.fields`), by name.
        views: Number of windows and image noises of each clip; None: new ones for every sample.
        training: Whether conditions are augmented; off in validation.
    """

    decodes = True

    def __init__(
        self,
        *,
        sources: Sequence[ClipSource],
        order: GlobalOrder,
        buckets: BucketAssignment,
        spec: SampleSpec,
        seed: int,
        timeout_s: float | None = None,
        fields: Mapping[str, FieldReader] | None = None,
        views: int | None = None,
        training: bool = True,
    ) -> None:
        self.sources = tuple(sources)
        self.order = order
        self.buckets = buckets
        self.spec = spec
        self.seed = seed
        self.timeout_s = timeout_s
        self.fields = dict(fields or {})
        self.views = views
        self.training = training
        self.given_up: dict[str, BadClip] = {}  # clips that made a worker hang or die
        self.on_attempt: Callable[[ClipRef], None] | None = None  # called with each clip before it is opened

    def __len__(self) -> int:
        return self.order.epoch_length

    def bucket(self, index: int) -> int:
        """Returns the bucket of a sample, whose shape it has even if another clip replaces its own."""
        return self.buckets.bucket(self.order.clip_ref(index))

    def shape(self, index: int) -> ClipShape:
        """Returns the shape of a sample."""
        return self.buckets.shape(self.order.clip_ref(index))

    def record(self, ref: ClipRef) -> ClipRecord:
        return self.sources[ref.source].clip(ref.clip)

    def __getitem__(self, index: int) -> SampleResult[VideoSample]:
        """Returns a sample; a bad clip is replaced by another one."""
        return self.read(index, self.sample)

    def read(self, index: int, sample: Callable[[int, ClipRef], T]) -> SampleResult[T]:
        """Returns the sample of a clip; a bad clip is replaced by another one, chosen by the index alone.

        Args:
            index: Global index.
            sample: (index, clip) -> the sample; raises BadClip if the clip cannot give one.

        Raises:
            DataError: No substitute is usable either.
        """
        failures: list[ClipFailure] = []
        for ref in self.clip_refs(index):
            clip_id = self.record(ref).clip_id
            if self.on_attempt is not None:
                self.on_attempt(ref)
            try:
                if clip_id in self.given_up:
                    raise self.given_up[clip_id]
                with one_clip():
                    return SampleResult(sample(index, ref), tuple(failures))
            except BadClip as error:
                failures.append(ClipFailure(index, clip_id, error.cause, error.detail, ref, error.may_pass))
        tried = "".join(f"\n    {f.clip_id} ({f.cause}: {f.detail})" for f in failures[:10])
        raise DataError(
            f"sample {index}: none of {len(failures)} clips can be used:{tried}",
            expected="a data set most of whose clips can be read",
            remedy="check args.train_data with `sat-train data inspect`",
        )

    def clip_refs(self, index: int) -> Iterator[ClipRef]:
        """Yields the clip of a sample, then its substitutes in turn.

        Substitutes are from the same bucket, or from any bucket if that has too few clips.
        """
        own = self.order.clip_ref(index)
        yield own
        others: list[ClipRef] = []
        drawn = {(own.source, own.clip)}
        count = 1
        for attempt in range(1, _DRAWS):
            other = derive_seed(self.seed, "substitute", index, attempt) % self.order.epoch_length
            ref = self.order.clip_ref(other)
            if (ref.source, ref.clip) in drawn:
                continue
            drawn.add((ref.source, ref.clip))
            if self.buckets.bucket(ref) != self.buckets.bucket(own):
                others.append(ref)
                continue
            yield ref
            count += 1
            if count == _SUBSTITUTES:
                return
        yield from others[: _SUBSTITUTES - count]

    def augmentation_key(self, index: int, ref: ClipRef) -> AugmentationKey:
        """Returns the key of the sample's augmentation.

        Raises:
            BadClip: The clip is missing.
        """
        if self.views is None:
            return AugmentationKey(self.seed, index, ref.visit)
        record = self.record(ref)
        size = read_stamp(record.path)[0] if record.span is None else record.span.size
        return limited_augmentation_key(size, record.start, record.end, ref.visit, self.views)

    def caption(self, index: int, ref: ClipRef) -> str:
        """Returns the caption of a sample."""
        captions = self.record(ref).captions
        return captions[derive_seed(self.seed, "caption", index) % len(captions)]

    def sample(self, index: int, ref: ClipRef) -> VideoSample:
        """Decodes a clip for an index.

        Raises:
            BadClip: It cannot give a sample.
        """
        record, augmentation, shape = self.record(ref), self.augmentation_key(index, ref), self.shape(index)
        frames, num_shown, fields = self._read(record, augmentation, shape)
        return VideoSample(
            video_tchw=to_tensor(frames.video_thwc),
            caption=self.caption(index, ref),
            image_chw=self._image(record.image, shape) if self.spec.images and record.image else None,
            clip_id=record.clip_id,
            sample_index=index,
            num_shown=num_shown,
            times=frames.times,
            augmentation=augmentation,
            training=self.training,
            fields=fields,
        )

    @staticmethod
    def collate(samples: Sequence[VideoSample]) -> SampleBatch:
        """Puts samples of one shape into a batch."""
        shapes = {tuple(sample.video_tchw.shape) for sample in samples}
        assert len(shapes) == 1, f"a batch must hold one shape, got {sorted(shapes)}"
        return SampleBatch(tuple(samples))

    def clip_window(self, index: int, ref: ClipRef, info: ClipInfo) -> Window:
        """Returns the times of a clip that a sample shows.

        Raises:
            BadClip: The clip is missing or too short.
        """
        return self._window(
            info, self.record(ref), self.augmentation_key(index, ref), self.shape(index).frames
        )

    def _read(
        self, record: ClipRecord, augmentation: AugmentationKey, shape: ClipShape
    ) -> tuple[Frames, int, dict[str, Any]]:
        """Returns the frames of a sample, the number of frames that the clip gave, and its fields."""
        deadline = None if self.timeout_s is None else time.monotonic() + self.timeout_s
        with open_frames(record.path, span=record.span, timeout_s=self.timeout_s) as reader:
            window = self._window(reader.info, record, augmentation, shape.frames)
            times = [window.start + i / self.spec.fps for i in range(window.count)]
            frames = reader.read(times, self._crop_chooser(shape))
            geometry = SampleGeometry(
                frames.times, window.total, frames.crop, self.spec.max_upscale, reader.number_at, deadline
            )
            fields = read_fields(self.fields, record.fields, geometry)
        return _repeat_last(frames, window.total), window.count, fields

    def _window(
        self, info: ClipInfo, record: ClipRecord, augmentation: AugmentationKey, num_frames: int
    ) -> Window:
        first, last = usable_part(info, record, self.spec.skip_frms_num)
        available = self.spec.available(info, record)
        count, total = fit_frames(available, num_frames=num_frames, policy=self.spec.short_clip)
        start = window_start(
            self.spec.window,
            first=first,
            last=last,
            length=(count - 1) / self.spec.fps,
            generator=augmentation.generator("window"),
            visit=augmentation.turn,
        )
        return Window(start, count, total)

    def _image(self, path: Path, shape: ClipShape) -> Tensor:
        with naming_image(path), open_frames(path, timeout_s=self.timeout_s) as reader:
            frames = reader.read([reader.info.first], self._crop_chooser(shape))
        return to_tensor(frames.video_thwc)[0]

    def _crop_chooser(self, shape: ClipShape) -> Callable[[int, int], CoverCrop]:
        """Returns the crop function for `FrameReader.read`; video and image of a sample are cropped alike."""
        return lambda height, width: cover_crop(
            source=(height, width), target=(shape.height, shape.width), max_upscale=self.spec.max_upscale
        )


@contextmanager
def naming_image(path: Path) -> Iterator[None]:
    """Names the image of a clip in a `BadClip` raised inside."""
    try:
        with one_clip():
            yield
    except BadClip as error:
        detail = f"its image {path.name}: {error.detail}"
        raise BadClip(error.cause, detail, may_pass=error.may_pass) from None


def _repeat_last(frames: Frames, total: int) -> Frames:
    missing = total - len(frames.times)
    times = frames.times + frames.times[-1:] * missing
    return replace(frames, video_thwc=repeat_last(frames.video_thwc, total), times=times)

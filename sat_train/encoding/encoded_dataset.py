"""Samples from the cache: encodings where it has them, else the pixels with the entries to fill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sat_train.data.batches import LoadedBatch, SampleBatch, VideoSample
from sat_train.data.clips.bad_clip import PASSING_CAUSES, BadClip, one_clip
from sat_train.data.dataset import VideoDataset
from sat_train.data.sampler import ClipRef
from sat_train.data.window import Window
from sat_train.encoding.cache.entries import SampleEntries, SampleFacts
from sat_train.encoding.cache.index import OpenCache
from sat_train.encoding.conditions.condition import Condition
from sat_train.encoding.conditions.text import TextCondition
from sat_train.encoding.encoded_batch import CLIP, MOMENTS, EncodedSample, Encodings, stack_samples
from sat_train.errors import DataError


@dataclass(frozen=True)
class UnencodedSample(VideoSample):
    """A sample of which the cache lacks an encoding.

    Args:
        entries: Cache entries of its encodings.
    """

    entries: SampleEntries = field(default_factory=dict)


class EncodedDataset:
    """Reads the encodings of a data set's samples in its workers, and decodes pixels where one is missing.

    Args:
        videos: The data set.
        cache: The open cache.
        conditions: Conditions whose encodings belong to a sample.
    """

    def __init__(self, videos: VideoDataset, cache: OpenCache, conditions: Sequence[Condition]) -> None:
        self.videos, self.cache = videos, cache
        self.conditions = tuple(condition for condition in conditions if condition.tensors)
        self.decodes = cache.use != "require"
        self._tensors = {CLIP: MOMENTS, **{each.name: each.tensors for each in self.conditions}}

    def sample(self, index: int, ref: ClipRef) -> EncodedSample | UnencodedSample:
        """Returns a sample of a clip, encoded where the cache has it.

        Raises:
            BadClip: The clip has no usable sample, or is known to be undecodable.
            DataError: Something is missing under `require`.
        """
        entries, window = self._entries_and_window(index, ref)
        clip_id = self.videos.record(ref).clip_id
        encodings = self._read(entries, clip_id)
        if encodings is not None:
            return EncodedSample(clip_id, index, window.count, encodings)
        decoded = self.videos.sample(index, ref)
        if self.entries(index, ref) != entries:
            raise BadClip("changed", "the file was changed while it was read")
        return UnencodedSample(**vars(decoded), entries=entries)

    def collate(self, samples: Sequence[EncodedSample | UnencodedSample]) -> LoadedBatch:
        """Collates samples into a batch, which is encoded if all of them are."""
        encoded = [sample for sample in samples if isinstance(sample, EncodedSample)]
        return stack_samples(encoded) if len(encoded) == len(samples) else SampleBatch(tuple(samples))

    def entries(self, index: int, ref: ClipRef) -> SampleEntries:
        """Returns the cache entries of a sample's encodings.

        Raises:
            BadClip: The clip is missing, unreadable, or too short.
        """
        with one_clip():
            return self._entries_and_window(index, ref)[0]

    def known_failure(self, entries: SampleEntries) -> BadClip | None:
        """Returns the reason why a clip is known to be undecodable.

        A failure that may be temporary, such as a timeout, counts under `require` only.
        """
        failure = self.cache.index.failure(entries[CLIP].key)
        if failure is None or (failure[0] in PASSING_CAUSES and self.cache.use != "require"):
            return None
        return BadClip(*failure)

    def missing(self, entries: SampleEntries) -> tuple[str, ...]:
        """Returns the names of a sample's encodings that the cache lacks."""
        return tuple(name for name, entry in entries.items() if entry.key not in self.cache.index)

    def _entries_and_window(self, index: int, ref: ClipRef) -> tuple[SampleEntries, Window]:
        facts = SampleFacts(self.videos, self.cache, index, ref)
        own = {condition.name: condition.entry(facts) for condition in self.conditions}
        return {CLIP: facts.clip, **own}, facts.window

    def _read(self, entries: SampleEntries, clip_id: str) -> Encodings | None:
        """Returns the encodings of a sample; None where one of them is missing."""
        if self.cache.use == "write":
            return None
        encodings = None if self.missing(entries) else self._read_all(entries)
        if encodings is None:
            failure = self.known_failure(entries)
            if failure is not None:
                raise failure
            if self.cache.use == "require":
                raise self._not_there(entries, clip_id)
        return encodings

    def _read_all(self, entries: SampleEntries) -> Encodings | None:
        """Returns the tensors of each encoding; None where one of them is missing or damaged."""
        encodings: Encodings = {}
        for name, entry in entries.items():
            tensors = self.cache.index.read(entry.key)
            if tensors is not None and tensors.keys() != self._tensors[name]:
                self.cache.index.drop(entry.key, f"holds {', '.join(sorted(tensors)) or 'nothing'}")
                tensors = None
            if tensors is None:
                return None
            encodings[name] = tensors
        return encodings

    def _not_there(self, entries: SampleEntries, clip_id: str) -> DataError:
        index = self.cache.index
        faults = [fault for entry in entries.values() if (fault := index.fault(entry.key))]
        if faults:
            return DataError(
                "\n  ".join([f"{clip_id}: damaged in the cache, with data.cache = require", *faults]),
                expected="every entry as it was written",
                remedy="`sat-train cache prune --damaged` removes it; then precompute, or data.cache=fill",
            )
        return DataError(
            f"{clip_id}: {' and '.join(self.missing(entries))} not in the cache, with data.cache = require",
            expected="every sample encoded with these files, settings and encoders",
            remedy="torchrun launch/precompute.py with the same --base, or data.cache=fill",
        )


@dataclass(frozen=True)
class MissingEncodings:
    """A sample with missing encodings.

    Args:
        index: Its global index.
        clip_id: Its clip.
        keys: Keys of the missing encodings, except its caption.
    """

    index: int
    clip_id: str
    keys: tuple[str, ...]


def find_missing(
    dataset: EncodedDataset, indices: Iterable[int], *, retry_failed: bool = False
) -> list[MissingEncodings]:
    """Returns the samples with missing encodings.

    A clip that cannot be opened, or is known to be undecodable, counts as the clip that replaces it.

    Args:
        dataset: The data set.
        indices: Global indices of the samples.
        retry_failed: Clips known to be undecodable are missing too.
    """
    samples = (_missing_of(dataset, index, retry_failed) for index in indices)
    return [sample for sample in samples if sample is not None]


def drop_repeated(missing: Sequence[MissingEncodings]) -> list[MissingEncodings]:
    """Keeps the first of all samples that lack the same encodings."""
    keys: set[str] = set()
    first = []
    for sample in missing:
        if not keys.issuperset(sample.keys):
            first.append(sample)
        keys.update(sample.keys)
    return first


def _missing_of(dataset: EncodedDataset, index: int, retry_failed: bool) -> MissingEncodings | None:
    for ref in dataset.videos.clip_refs(index):
        try:
            entries = dataset.entries(index, ref)
        except BadClip:
            continue
        missing = dataset.missing(entries)
        if not missing:
            return None
        if CLIP in missing and not retry_failed and dataset.known_failure(entries) is not None:
            continue
        keys = tuple(entries[name].key for name in missing if name != TextCondition.name)
        return MissingEncodings(index, dataset.videos.record(ref).clip_id, keys)
    return None  # no usable clip at all: the loader reports it

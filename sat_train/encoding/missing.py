"""Finds what is missing from the cache before a run, so that it need not load encoders or ends at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sat_train.data.clips.bad_clip import BadClip
from sat_train.encoding.conditions.text import TextCondition
from sat_train.encoding.encoded_batch import CLIP
from sat_train.encoding.encoded_dataset import EncodedDataset


@dataclass(frozen=True)
class MissingEncodings:
    """A sample that is not all there.

    Args:
        index: Its global index.
        clip_id: Its clip.
        keys: Of what is missing, its caption aside.
    """

    index: int
    clip_id: str
    keys: tuple[str, ...]


def find_missing(
    dataset: EncodedDataset, indices: Iterable[int], *, retry_failed: bool = False
) -> list[MissingEncodings]:
    """Returns which samples are not all in the cache.

    A clip that cannot be opened, or is known to be undecodable, counts as the clip that takes its place.

    Args:
        dataset: The data set.
        indices: Global indices of the samples.
        retry_failed: Clips known to be undecodable are missing too.
    """
    missing = (_missing_of(dataset, index, retry_failed) for index in indices)
    return [found for found in missing if found is not None]


def drop_repeated(missing: Sequence[MissingEncodings]) -> list[MissingEncodings]:
    """Keeps of the samples that lack the same encodings only the first."""
    seen: set[str] = set()
    kept = []
    for sample in missing:
        if not seen.issuperset(sample.keys):
            kept.append(sample)
        seen.update(sample.keys)
    return kept


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
    return None  # no usable clip at all: the loader says so

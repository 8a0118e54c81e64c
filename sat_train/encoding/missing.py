"""Search for missing cache entries before a run, which then skips the encoders or fails at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sat_train.data.clips.bad_clip import BadClip
from sat_train.encoding.conditions.text import TextCondition
from sat_train.encoding.encoded_batch import CLIP
from sat_train.encoding.encoded_dataset import EncodedDataset


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

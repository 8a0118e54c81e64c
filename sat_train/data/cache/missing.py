"""What is missing from the cache: before a run, so that it need not load encoders or ends at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sat_train.data.bad_clips import BadClip
from sat_train.data.dataset import VideoDataset


@dataclass(frozen=True)
class MissingEncodings:
    """A sample that is not all there.

    Args:
        index: Its global index.
        clip_id: Its clip.
        keys: Of what is missing of its pixels: clip, image.
        text: Whether its caption is missing.
    """

    index: int
    clip_id: str
    keys: tuple[str, ...]
    text: bool


def find_missing(
    dataset: VideoDataset, indices: Iterable[int], *, retry_failed: bool = False
) -> list[MissingEncodings]:
    """Returns which samples are not all in the cache.

    A clip that cannot be opened, or is known to be undecodable, counts as the clip that takes its place.

    Args:
        dataset: With a cache.
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


def _missing_of(dataset: VideoDataset, index: int, retry_failed: bool) -> MissingEncodings | None:
    cache = dataset.cache
    assert cache is not None, "a data set without a cache"
    for ref in dataset.clip_refs(index):
        try:
            keys = dataset.keys(index, ref)
        except BadClip:
            continue
        parts = cache.missing(keys)
        if not parts:
            return None
        if "clip" in parts and not retry_failed and cache.known_failure(keys) is not None:
            continue
        wanted = tuple(key for part in parts if part != "text" for key in [getattr(keys, part)])
        return MissingEncodings(index, dataset.record(ref).clip_id, wanted, "text" in parts)
    return None  # no usable clip at all: the loader says so

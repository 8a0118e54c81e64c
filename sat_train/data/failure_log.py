"""Bad clips: counted, named with their cause, recorded, and replaced by other clips."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sat_train.data.sampler import ClipRef
from sat_train.errors import DataError
from sat_train.log import get_logger

log = get_logger(__name__)

_FIELDS = ("sample_index", "clip_id", "cause", "detail")  # of a failure, in the file


@dataclass(frozen=True)
class ClipFailure:
    """Record of a sample whose clip was bad.

    Args:
        sample_index: Global position of the sample; None: the clip was left out before the first one.
        clip_id: The clip that failed.
        cause: A word to count by.
        detail: What was found.
        ref: Which clip it is; None where the source could not even give it.
        may_pass: The next try may succeed.
    """

    sample_index: int | None
    clip_id: str
    cause: str
    detail: str
    ref: ClipRef | None = None
    may_pass: bool = False


class FailureLog:
    """Collects the bad clips of this rank, and ends the run if there are too many.

    Args:
        num_clips: Clips in the whole set.
        max_bad_fraction: Share of them that may be bad (`data.max_bad_fraction`).
        path: File for one JSON object per bad clip; None: no file.
        rank: Global rank, for the file.
    """

    def __init__(
        self, *, num_clips: int, max_bad_fraction: float, path: Path | None = None, rank: int = 0
    ) -> None:
        self.num_clips = num_clips
        self.max_bad_fraction = max_bad_fraction
        self.path = path
        self.rank = rank
        self.by_clip: dict[str, ClipFailure] = {}

    def add(self, failure: ClipFailure) -> None:
        """Counts one failure; the first failure of a clip is also logged and written to the file."""
        if failure.clip_id in self.by_clip:
            return
        self.by_clip[failure.clip_id] = failure
        log.warning("%s cannot be used (%s: %s), another clip takes its place", *_words(failure))
        if self.path is not None:
            write_failures(self.path, [failure], rank=self.rank)

    def check(self, bad_clips: Mapping[str, ClipFailure] | None = None) -> None:
        """Ends the run if more clips are bad than allowed.

        Args:
            bad_clips: Bad clips of all ranks, when the caller has gathered them; None: those of this rank.

        Raises:
            DataError: With the first ten.
        """
        bad_clips = self.by_clip if bad_clips is None else bad_clips
        if len(bad_clips) <= self.max_bad_fraction * self.num_clips:
            return
        examples = "".join(
            f"\n    {clip} ({cause}: {detail})"
            for clip, cause, detail in map(_words, list(bad_clips.values())[:10])
        )
        where = f" All of them are in {self.path}." if self.path else ""
        raise DataError(
            f"{len(bad_clips)} of {self.num_clips} clips cannot be used:{examples}",
            expected=f"at most {self.max_bad_fraction:.1%} (data.max_bad_fraction = {self.max_bad_fraction})",
            remedy=f"repair or remove these clips, or raise data.max_bad_fraction.{where}",
        )


def write_failures(path: Path, failures: Sequence[ClipFailure], *, rank: int) -> None:
    """Appends one JSON object per clip to a file; an error in writing does not end training."""
    try:
        _append_failures(path, failures, rank=rank)
    except OSError as error:
        log.error("%s cannot be written, training continues: %s", path, error.strerror or error)


def _append_failures(path: Path, failures: Sequence[ClipFailure], *, rank: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        for failure in failures:
            record = {name: getattr(failure, name) for name in _FIELDS}
            line = json.dumps({**record, "rank": rank, "time": round(time.time(), 3)})
            os.write(descriptor, (line + "\n").encode())  # one write: lines of several ranks do not mix
    finally:
        os.close(descriptor)


def _words(failure: ClipFailure) -> tuple[str, str, str]:
    return failure.clip_id, failure.cause, failure.detail

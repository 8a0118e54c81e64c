"""Losses of single clips at fixed timesteps, and what they say about the mean: bootstrap intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_RESAMPLES = 2000
_FEWEST_CLIPS = 5  # the resamples of fewer are too alike for an interval of 95 %
_PERCENTILES = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A mean over clips, with the limits of its 95 % interval.

    Args:
        mean: The mean.
        low: Lower limit; NaN where there are too few clips to tell.
        high: Upper limit, likewise.
    """

    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """True where there were clips enough, and all losses were finite."""
        return math.isfinite(self.low)


@dataclass(frozen=True)
class ClipLosses:
    """Validation losses of one step.

    Args:
        timesteps: The grid of timesteps.
        clips: Losses at each of them, by clip.
    """

    timesteps: tuple[int, ...]
    clips: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        assert self.clips, "no clip was validated"
        assert all(len(losses) == len(self.timesteps) for losses in self.clips.values())

    def __len__(self) -> int:
        return len(self.clips)

    def mean(self) -> Estimate:
        """Returns the mean over clips and timesteps; its interval is over clips."""
        return estimate_means(_over_timesteps(self.clips.values()))[0]

    def by_timestep(self) -> dict[int, Estimate]:
        """Returns the mean over clips at each timestep."""
        return dict(zip(self.timesteps, estimate_means(list(self.clips.values())), strict=True))

    def at(self, timesteps: Sequence[int]) -> ClipLosses:
        """Returns the losses at some of the timesteps."""
        columns = [self.timesteps.index(timestep) for timestep in timesteps]
        rows = {clip: tuple(row[column] for column in columns) for clip, row in self.clips.items()}
        return ClipLosses(tuple(timesteps), rows)

    def minus(self, other: ClipLosses) -> ClipLosses:
        """Returns the differences of the clips that both have: paired, so the clips' own spread cancels."""
        assert self.timesteps == other.timesteps, "losses at other timesteps cannot be paired"
        shared = [clip for clip in self.clips if clip in other.clips]
        return ClipLosses(
            self.timesteps, {clip: _minus(self.clips[clip], other.clips[clip]) for clip in shared}
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the losses as a record of a JSON file."""
        return {
            "timesteps": list(self.timesteps),
            "clips": {clip: list(row) for clip, row in self.clips.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ClipLosses:
        """Restores what `as_json` gave.

        Raises:
            Exception: It is something else.
        """
        clips = {str(clip): tuple(map(_number, row)) for clip, row in record["clips"].items()}
        return cls(tuple(map(int, record["timesteps"])), clips)


def estimate_means(rows: Sequence[Sequence[float]]) -> list[Estimate]:
    """Estimates the mean of each column, with a percentile bootstrap over the rows.

    The resamples depend on the number of rows alone, so that the same losses give the same interval, and all
    columns share them. The mean is rounded once, whatever the order of the rows.

    Args:
        rows: One for each clip.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
    if len(rows) < _FEWEST_CLIPS:
        return [Estimate(mean, math.nan, math.nan) for mean in means]
    resampled = _resampling_weights(len(rows)) @ np.array(rows)
    low, high = np.percentile(resampled, _PERCENTILES, axis=0)
    return [Estimate(*map(float, limits)) for limits in zip(means, low, high, strict=True)]


@functools.lru_cache(maxsize=4)
def _resampling_weights(count: int) -> np.ndarray:
    """Returns the share of each row in each resample: [resamples, rows]."""
    generator = np.random.Generator(np.random.PCG64(count))
    return generator.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES) / count


def _over_timesteps(rows: Sequence[Sequence[float]] | Any) -> list[tuple[float]]:
    return [(math.fsum(row) / len(row),) for row in rows]


def _minus(row: Sequence[float], other: Sequence[float]) -> tuple[float, ...]:
    return tuple(one - two for one, two in zip(row, other, strict=True))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)

"""Maps each sample to its clip and its augmentation, as pure functions of seed and position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sat_train.distributed.seeds import derive_generator, derive_seed

_BLOCK = 1000  # samples over which a mixture keeps its shares exactly; more if a share needs it
_LONGEST_BLOCK = 10_000_000


@dataclass(frozen=True)
class ClipRef:
    """Identifies the clip of a sample: source, clip and visit.

    Args:
        source: Index of the source.
        clip: Index of the clip in it.
        visit: Epoch of the source: how often the clip was used before.
    """

    source: int
    clip: int
    visit: int


@dataclass(frozen=True)
class AugmentationKey:
    """Key of everything random about a sample's pixels: window, noise on its first frame.

    Args:
        seed: The run's seed; 0 if a clip has only a few views, which are the same in every run.
        number: Distinguishes views: the global sample index, or a number made of clip and turn.
        turn: Number of earlier uses of the clip, for windows that spread evenly over it.
    """

    seed: int
    number: int
    turn: int = 0

    def generator(self, purpose: str) -> torch.Generator:
        """Returns the random generator for one purpose."""
        return derive_generator(self.seed, purpose, self.number)


def limited_augmentation_key(
    size: int, start: float | None, end: float | None, visit: int, views: int
) -> AugmentationKey:
    """Returns the key of a clip's `visit`-th use, if it has only `views` of them.

    Views take turns, so that each is shown equally often. They depend on the clip alone, not on the seed, the
    order, the name, the folder or other clips. The size of a file is known without reading it, and is enough
    to give each clip its own windows.

    Args:
        size: Size of the clip in bytes.
        start: Start of the part to use, in seconds; None: that of the file.
        end: End of the part; None: that of the file.
        visit: Number of earlier uses of the clip.
        views: Number of its views.
    """
    turn = visit % views
    return AugmentationKey(0, derive_seed(turn, f"view of {size} bytes, {start} to {end}"), turn)


class GlobalOrder:
    """Maps every position in the order to a clip, without state.

    One epoch of a source takes each of its clips once, or `weight` times on average, in a new order each
    time. Sources without weights are shuffled together. With weights, each block of 1000 samples (10,000, ...
    if a share is below a thousandth) holds the shares exactly, and every source goes through its own epochs.

    Args:
        seed: The run's seed.
        clip_weights: For each source, the weight of each clip.
        source_weights: Share of each source; None: all sources form one set.
        shuffle: Whether to shuffle; otherwise clips come in their listed order.
    """

    def __init__(
        self,
        *,
        seed: int,
        clip_weights: Sequence[Sequence[float]],
        source_weights: Sequence[float] | None = None,
        shuffle: bool = True,
    ) -> None:
        assert all(len(weights) for weights in clip_weights), "a source without clips"
        self._seed = seed
        self._shuffle = shuffle
        self._sizes = [len(weights) for weights in clip_weights]
        if source_weights is None:
            self._pools = [np.concatenate([np.asarray(weights, float) for weights in clip_weights])]
            self._quotas = np.array([_BLOCK])
        else:
            self._pools = [np.asarray(weights, float) for weights in clip_weights]
            self._quotas = _choose_quotas(source_weights)
        self._block = int(self._quotas.sum())
        self._lengths = [max(1, round(pool.sum())) for pool in self._pools]
        self._epochs: dict[tuple[int, int], np.ndarray] = {}
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @property
    def epoch_length(self) -> int:
        """Samples of one epoch; for a mixture, the total of all its sources' epochs."""
        return sum(self._lengths)

    def clip_ref(self, sample: int) -> ClipRef:
        """Returns the clip of sample number `sample` (from 0)."""
        assert sample >= 0, sample
        pool, position = self._position(sample)
        epoch, offset = divmod(position, self._lengths[pool])
        clip = int(self._epoch_clips(pool, epoch)[offset])
        if len(self._pools) == len(self._sizes):
            return ClipRef(pool, clip, epoch)
        source = int(np.searchsorted(np.cumsum(self._sizes), clip, side="right"))
        return ClipRef(source, clip - sum(self._sizes[:source]), epoch)

    def _position(self, sample: int) -> tuple[int, int]:
        """Returns the pool that a sample comes from, and the number of samples that the pool gave before."""
        if len(self._pools) == 1:
            return 0, sample
        block, offset = divmod(sample, self._block)
        pools, before = self._block_pools(block)
        pool = int(pools[offset])
        return pool, block * int(self._quotas[pool]) + int(before[offset])

    def _block_pools(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pool of each sample of a block, and the number of samples of that pool before it."""
        if block not in self._blocks:
            pools = np.repeat(np.arange(len(self._quotas)), self._quotas)
            pools = pools[_permutation(len(pools), derive_seed(self._seed, "mixture", block))]
            before = np.empty_like(pools)
            starts = np.repeat(np.cumsum(self._quotas) - self._quotas, self._quotas)
            before[np.argsort(pools, kind="stable")] = np.arange(len(pools)) - starts
            self._blocks = {block: (pools, before)}
        return self._blocks[block]

    def _epoch_clips(self, pool: int, epoch: int) -> np.ndarray:
        """Returns the clips of one epoch in order; the last two epochs of each pool are kept in memory."""
        if (pool, epoch) not in self._epochs:
            if len(self._epochs) >= 2 * len(self._pools):
                self._epochs.clear()
            self._epochs[pool, epoch] = self._order_epoch(pool, epoch)
        return self._epochs[pool, epoch]

    def _order_epoch(self, pool: int, epoch: int) -> np.ndarray:
        """Returns the clips of one epoch in order; a clip of weight w appears w times on average."""
        weights = self._pools[pool]
        offset = derive_seed(self._seed, "weights", pool, epoch) / 2**63 if np.any(weights != 1) else 0.0
        edges = np.cumsum(weights) * (self._lengths[pool] / weights.sum())
        edges[-1] = self._lengths[pool]
        taken = np.diff(np.floor(edges + offset + 1e-9), prepend=np.floor(offset + 1e-9))
        clips = np.repeat(np.arange(len(weights)), taken.astype(np.int64))
        if not self._shuffle:
            return clips
        shuffled: np.ndarray = clips[_permutation(len(clips), derive_seed(self._seed, "order", pool, epoch))]
        return shuffled


def _choose_quotas(shares: Sequence[float]) -> np.ndarray:
    """Returns the number of samples of each source in a block; the block grows until it is at least one."""
    block = _BLOCK
    while (quotas := _round_shares(shares, block)).min() == 0 and block < _LONGEST_BLOCK:
        block *= 10
    assert quotas.min() > 0, f"the smallest of {shares} is never drawn"
    return quotas


def _round_shares(shares: Sequence[float], total: int) -> np.ndarray:
    """Returns integers in the given proportion that sum to `total` (largest remainders)."""
    exact = np.asarray(shares, float) / sum(shares) * total
    whole = np.floor(exact).astype(np.int64)
    for i in np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]:
        whole[i] += 1
    return whole


def _permutation(length: int, seed: int) -> np.ndarray:
    """Returns a permutation of `range(length)`: the rank order of SplitMix64's first outputs.

    Written out because libraries do not promise that theirs stay the same from version to version.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    with np.errstate(over="ignore"):
        state = np.uint64(seed) + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return np.argsort(state, kind="stable")

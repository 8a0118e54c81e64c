"""Facts of a run that its configuration does not hold: its data and its machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipCounts:
    """Numbers of clips, known once the data has been read.

    Args:
        train: Clips to train on.
        valid: Clips to validate on.
    """

    train: int
    valid: int


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run beyond its configuration; None where they are unknown.

    Args:
        clips: Clips in the data.
        data_ranks: Ranks with batches of their own.
        steps: Steps of the whole run.
        card_gib: Memory of one GPU, in GiB.
        long_captions: Share of the captions that the text encoder truncates.
        adapter_scales: Scales at which the adapters that the run starts from were trained.
    """

    clips: ClipCounts | None = None
    data_ranks: int | None = None
    steps: int | None = None
    card_gib: float | None = None
    long_captions: float | None = None
    adapter_scales: tuple[float, ...] | None = None

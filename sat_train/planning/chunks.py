"""Counts each kind of chunk of a clip once: an autoencoder codes dozens of equal ones, tile by tile."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sat_train.models.meters import RunMeter, Stretch
from sat_train.models.vae.causal import ClipState


@dataclass(frozen=True)
class _Chunk:
    """Count of a chunk, and the shapes of what it leaves."""

    stretch: Stretch
    coded: torch.Size
    tails: dict[nn.Module, torch.Size]


class CountedChunks(nn.Module):
    """An encoder or decoder on the meta device that runs a chunk only if none of its shape has run.

    Args:
        coder: The encoder or decoder.
        meter: Counts the run, a chunk that does not run like the one that did.
    """

    def __init__(self, coder: nn.Module, meter: RunMeter) -> None:
        super().__init__()
        self.coder = coder
        self._meter = meter
        self._known: dict[tuple[object, ...], _Chunk] = {}

    def forward(self, x: Tensor, state: ClipState) -> Tensor:
        """Codes one chunk, as the coder does."""
        key = (x.shape, x.stride(), state.at_start)  # the tails of a clip have the shapes of its chunks
        if key not in self._known:
            coded: Tensor
            coded, stretch = self._meter.stretch(partial(self.coder, x, state))
            tails = {conv: tail.shape for conv, tail in state.tails.items()}
            self._known[key] = _Chunk(stretch, coded.shape, tails)
            return coded
        known = self._known[key]
        self._meter.repeat(known.stretch)
        state.tails.clear()
        state.tails.update({conv: x.new_empty(shape) for conv, shape in known.tails.items()})
        return x.new_empty(known.coded)

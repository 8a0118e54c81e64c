"""The state of a rank that a checkpoint saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sat_train.checkpoint.fragments import Fragment


@dataclass(frozen=True)
class RunState:
    """The state of one rank that a checkpoint saves.

    Args:
        weights: The weights that the network computes with, whole for a rank of the model axis; None on ranks
            that do not write them.
        fragments: The trained state that this rank owns.
        client_state: Plain values, the same on all ranks.
        pieces: Where no rank holds whole weights, in place of them: the `PIECE` of each that this rank holds.
            The first data rank has the beginning of each, in their order.
    """

    weights: Mapping[str, Tensor] | None
    fragments: Sequence[Fragment]
    client_state: Mapping[str, object]
    pieces: Sequence[Fragment] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which they are written."""
        tensors = [*(self.weights or {}).values()]
        for fragment in (*(self.pieces or ()), *self.fragments):
            tensors += [*fragment.tensors.values(), *fragment.indivisible.values()]
        return tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> RunState:
        """Returns this state with other tensors, in the order of `tensors`."""
        left = iter(tensors)
        weights = None if self.weights is None else {name: next(left) for name in self.weights}
        pieces = None if self.pieces is None else [_with_tensors(piece, left) for piece in self.pieces]
        fragments = [_with_tensors(fragment, left) for fragment in self.fragments]
        return replace(self, weights=weights, pieces=pieces, fragments=fragments)


def _with_tensors(fragment: Fragment, left: Iterator[Tensor]) -> Fragment:
    return replace(
        fragment,
        tensors={kind: next(left) for kind in fragment.tensors},
        indivisible={kind: next(left) for kind in fragment.indivisible},
    )

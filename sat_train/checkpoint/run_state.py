"""The state of a rank that a checkpoint saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """

    weights: Mapping[str, Tensor] | None
    fragments: Sequence[Fragment]
    client_state: Mapping[str, object]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which they are written."""
        tensors = [*(self.weights or {}).values()]
        for fragment in self.fragments:
            tensors += [*fragment.tensors.values(), *fragment.indivisible.values()]
        return tensors

    def with_tensors(self, tensors: Sequence[Tensor]) -> RunState:
        """Returns this state with other tensors, in the order of `tensors`."""
        left = iter(tensors)
        weights = None if self.weights is None else {name: next(left) for name in self.weights}
        fragments = [
            replace(
                fragment,
                tensors={kind: next(left) for kind in fragment.tensors},
                indivisible={kind: next(left) for kind in fragment.indivisible},
            )
            for fragment in self.fragments
        ]
        return replace(self, weights=weights, fragments=fragments)

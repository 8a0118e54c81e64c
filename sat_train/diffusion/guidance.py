"""Classifier-free guidance: pushes a prediction away from the one without a caption.

v = v_null + scale * (v_text - v_null)
"""

from __future__ import annotations

from typing import Protocol


class Guidance(Protocol):
    """A guidance scale for each step."""

    @property
    def needs_null(self) -> bool:
        """True where the network must be evaluated without the caption too."""
        ...

    def scale_at(self, timestep: int, steps: int) -> float:
        """Returns the scale of the step at `timestep` in a run of `steps` steps."""
        ...

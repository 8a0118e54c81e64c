"""Guidance with one scale."""

from __future__ import annotations

from dataclasses import dataclass

from sat_train.config.parts.guidance_parts import ConstantGuidanceParams


@dataclass(frozen=True)
class ConstantGuidance:
    """Guidance with the same scale at every step.

    Args:
        scale: Guidance scale; 1 means no guidance, with one network evaluation per step.
    """

    scale: float = 6.0

    @property
    def needs_null(self) -> bool:
        """True where the network must be evaluated without the caption too."""
        return self.scale != 1.0

    def scale_at(self, timestep: int, steps: int) -> float:
        """Returns the scale of the step at `timestep` in a run of `steps` steps."""
        return self.scale


def build(params: ConstantGuidanceParams) -> ConstantGuidance:
    """Builds the guidance."""
    return ConstantGuidance(params.scale)

"""CogVideoX's cosine guidance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sat_train.config.parts.guidance_parts import DynamicGuidanceParams


@dataclass(frozen=True)
class DynamicGuidance:
    """CogVideoX's cosine guidance, exactly as released.

    Both sources use the *timestep* (999 to 0) in place of the number of steps done. With 50 steps the scale
    therefore does not rise smoothly from 1 to `1 + scale`: it jumps between the two, and falls to 1 in the
    last few steps. The models are sampled this way everywhere, so it is kept.

    Args:
        scale: Range of the guidance scale, which moves between 1 and `1 + scale`.
        exp: Exponent; a whole number, because its base is negative at most timesteps.

    Source: zai-org/CogVideo@7a1af71 `sgm/modules/diffusionmodules/guiders.py` DynamicCFG with `sampling.py`
    VideoDDIMSampler.denoise (`step_index = num_steps - timestep`); diffusers 0.42 `CogVideoXPipeline`
    `use_dynamic_cfg`. The two are the same function.
    """

    scale: float = 6.0
    exp: float = 5.0

    def __post_init__(self) -> None:
        assert float(self.exp).is_integer(), f"exp = {self.exp} is not a whole number"

    @property
    def needs_null(self) -> bool:
        """True where the network must be evaluated without the caption too."""
        return self.scale != 0.0

    def scale_at(self, timestep: int, steps: int) -> float:
        """Returns the scale of the step at `timestep` in a run of `steps` steps."""
        done = (steps - timestep) / steps
        return 1.0 + self.scale * (1.0 - math.cos(math.pi * done**self.exp)) / 2.0


def build(params: DynamicGuidanceParams) -> DynamicGuidance:
    """Builds the guidance."""
    return DynamicGuidance(params.scale, params.exp)

"""The signature of samplers: flat functions from noise to a clean latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from sat_train.diffusion.timesteps import Spacing

Denoise = Callable[[Tensor, int], Tensor]
DrawNoise = Callable[[], Tensor]
OnStep = Callable[[int, int], None]


class Sampler(Protocol):
    """A way through the noise schedule; guidance and conditioning are the caller's."""

    def __call__(
        self,
        denoise: Denoise,
        draw_noise: DrawNoise,
        *,
        alpha_bar: Tensor,
        steps: int,
        spacing: Spacing = "trailing",
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Samples.

        Args:
            denoise: (latent, timestep) -> predicted v, of the latent's shape.
            draw_noise: Returns unit normal noise of the latent's shape, float32. The first is the start.
            alpha_bar: Schedule, float64 of shape (num_timesteps,).
            steps: Number of network evaluations.
            spacing: Which timesteps are visited.
            on_step: Called with (index of the finished step, steps).

        Returns:
            Clean latent.
        """
        ...

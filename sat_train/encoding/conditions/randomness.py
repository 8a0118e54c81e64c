"""Random numbers of a batch: one stream for each sample and purpose, independent of the rest of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sat_train.data.batches import StepPosition
from sat_train.distributed.seeds import derive_generator
from sat_train.distributed.transfer import to_device


class Randomness:
    """Draws for the samples of one batch, or for the prompts of one call.

    Attributes:
        posterior_sampling: Latents are drawn from their posterior; off, they are its mean.
    """

    posterior_sampling = True

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Returns unit normal numbers, float32, of shape (b, *shape), on the CPU."""
        raise NotImplementedError

    def latent(self, moments: Mapping[str, Tensor], purpose: str) -> Tensor:
        """Returns unscaled latents of posteriors (`mean`, `logvar`), float32, on the device of these."""
        mean = moments["mean"].float()
        if not self.posterior_sampling:
            return mean
        eps = to_device(self.normal(purpose, tuple(mean.shape[1:])), mean.device)
        return mean + (0.5 * moments["logvar"].float()).exp() * eps


class DrawsAhead:
    """Draws the unit normal numbers of the next batch while the host would only wait for the device.

    They are those that the last batch had, of the same purposes and shapes. What the next one needs besides,
    or in other shapes, as with buckets, is drawn when it comes.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._shapes: dict[str, tuple[int, ...]] = {}  # of the last batch, by purpose
        self._drawn: dict[tuple[str, int, tuple[int, ...]], Tensor] = {}

    def draw(self, sample_indices: Sequence[int]) -> None:
        """Draws for samples to come, in place of what was drawn before."""
        self._drawn = {
            (purpose, index, shape): _normal(self._seed, purpose, index, shape)
            for purpose, shape in self._shapes.items()
            for index in sample_indices
        }

    def normal(self, purpose: str, index: int, shape: tuple[int, ...]) -> Tensor:
        """Returns the numbers of a sample, which are not to be changed."""
        self._shapes[purpose] = shape
        drawn = self._drawn.get((purpose, index, shape))
        return _normal(self._seed, purpose, index, shape) if drawn is None else drawn


def _normal(seed: int, purpose: str, index: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=derive_generator(seed, purpose, index))


@dataclass(frozen=True)
class SampleRandomness(Randomness):
    """Draws for the samples of one batch, on the CPU, in full precision.

    A sample's numbers depend on `(seed, purpose, its index)` alone, its stratum on its position in the
    step: not on the world size, the micro-batch, the rank or the order of the draws. Ranks that hold the same
    sample draw the same numbers and need not exchange them.

    Args:
        seed: The run's seed.
        sample_indices: Global index of each sample of the batch.
        posterior_sampling: Latents are drawn from their posterior; off, they are its mean.
        ahead: Has drawn some of the normal numbers, from the same seed.
    """

    seed: int
    sample_indices: tuple[int, ...]
    posterior_sampling: bool = True
    ahead: DrawsAhead | None = None

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Returns unit normal numbers, float32, of shape (b, *shape)."""
        ahead = self.ahead or DrawsAhead(self.seed)
        return torch.stack([ahead.normal(purpose, index, tuple(shape)) for index in self.sample_indices])

    def uniform(self, purpose: str) -> Tensor:
        """Returns one number in [0, 1) for each sample, float64, of shape (b,)."""
        return torch.stack(
            [
                torch.rand((), generator=generator, dtype=torch.float64)
                for generator in self._generators(purpose)
            ]
        )

    def chance(self, purpose: str, probability: float) -> Tensor:
        """Draws for each sample whether an event of this probability happens, bool, of shape (b,)."""
        return self.uniform(purpose) < probability

    def strata(self, purpose: str, step_positions: Sequence[StepPosition]) -> Tensor:
        """Draws for each sample of an optimizer step a different number below the size of the step.

        A sample's number depends on its position in the step, not on its index: with buckets the samples of a
        step have no consecutive indices, and the strata must cover each step.

        Args:
            purpose: Key of these random numbers.
            step_positions: Of the samples of the batch in their step.

        Returns:
            int64 of shape (b,).
        """
        assert len(step_positions) == len(self.sample_indices), "strata need the positions in the step"
        return torch.stack([self._shuffled(purpose, position) for position in step_positions])

    def _shuffled(self, purpose: str, position: StepPosition) -> Tensor:
        generator = derive_generator(self.seed, purpose, position.step)
        return torch.randperm(position.size, generator=generator)[position.position]

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [derive_generator(self.seed, purpose, index) for index in self.sample_indices]


@dataclass(frozen=True)
class PromptRandomness(Randomness):
    """Draws for prompts, each from its own generator, in the order in which diffusers draws.

    Args:
        generators: One for each prompt, on the CPU.
    """

    generators: tuple[torch.Generator, ...]

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Returns the next unit normal numbers, float32, of shape (b, *shape)."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

"""Draws of training for a batch: a timestep of each sample, a level of each frame, and the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sat_train.data.batches import StepPosition
from sat_train.diffusion.loss import offset_noise
from sat_train.diffusion.timestep_laws import CLEAN, TimestepLaw
from sat_train.diffusion.timesteps import stratify, timesteps_at
from sat_train.encoding.conditions.condition import Encoding
from sat_train.encoding.conditions.randomness import Randomness, SampleRandomness
from sat_train.errors import SatTrainError


class NoiseLaw:
    """The distribution of the noise that training adds and sampling starts from: unit normal numbers.

    A law of your own overrides `draw`. Its noise should have unit variance at each element, whatever it
    depends on, and the network meets the same law in training, validation and sampling.

    Args:
        params: The part's parameter record.
        model: The model's description.
    """

    def __init__(self, params: Any = None, model: Any = None) -> None:
        self.params, self.model = params, model

    def draw(self, random: Randomness, shape: tuple[int, ...], encoded: Mapping[str, Encoding]) -> Tensor:
        """Returns the noise of a batch, float32 `[b, *shape]` on any device.

        Args:
            random: Random numbers of the samples, or of the prompts.
            shape: Of one sample's latent, padded in time, (t, c, h, w).
            encoded: Encodings of the conditions by name, batch first, before drop-out.
        """
        return random.normal("noise", shape)


@dataclass(frozen=True)
class Noising:
    """The laws of timesteps and noise.

    Args:
        alpha_bar: Noise schedule, float64 of shape (num_timesteps,), on the CPU.
        timestep_law: Distribution of the training timesteps; it may have `levels`.
        stratified: Spread the timesteps evenly over the distribution in each optimizer step; off, each
            sample's is drawn alone.
        noise_law: Distribution of the noise.
        offset_level: Standard deviation of the noise that all elements of a sample share in training.
    """

    alpha_bar: Tensor
    timestep_law: TimestepLaw
    stratified: bool
    noise_law: NoiseLaw
    offset_level: float

    def timesteps(self, random: SampleRandomness, step_positions: Sequence[StepPosition]) -> Tensor:
        """Draws the timestep of each sample, int64 `[b]`."""
        uniform_b = random.uniform("timestep")
        if self.stratified:
            strata_b = random.strata("timestep_strata", step_positions)
            num_strata_b = torch.tensor([position.size for position in step_positions])
            uniform_b = stratify(uniform_b, strata_b, num_strata_b)
        return timesteps_at(self.timestep_law(uniform_b), len(self.alpha_bar))

    @property
    def has_levels(self) -> bool:
        """True where latent frames of one sample may have different timesteps."""
        return hasattr(self.timestep_law, "levels")

    def levels(self, timesteps_b: Tensor, latent_shape: Sequence[int]) -> Tensor | None:
        """Returns the timestep of each latent frame, int64 `[b, t]`, -1 where it is clean.

        Args:
            timesteps_b: The samples' timesteps.
            latent_shape: Of the noised latent, (b, t, c, h, w).

        Returns:
            None where all frames have the sample's.
        """
        of_law = getattr(self.timestep_law, "levels", None)
        if of_law is None:
            return None
        levels_bt: Tensor = of_law(timesteps_b, tuple(latent_shape), len(self.alpha_bar))
        assert levels_bt.shape == tuple(latent_shape[:2]), f"levels {tuple(levels_bt.shape)}, not [b, t]"
        return levels_bt

    def known_frames(
        self, latent_shape: Sequence[int], history_btchw: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the frames that sampling is given: those that the law of the timesteps keeps clean.

        Args:
            latent_shape: Of the noised latent, (b, t, c, h, w).
            history_btchw: The first frames of the latent; None: none are given.

        Returns:
            A clean latent of that shape, and where it counts, bool `[b, t]`; on the device of the history.

        Raises:
            SatTrainError: A frame that the law keeps clean is not given, or one has another timestep than the
                sample's and is not clean either.
        """
        timesteps_b = torch.full((latent_shape[0],), len(self.alpha_bar) // 2)
        levels_bt = self.levels(timesteps_b, latent_shape)
        assert levels_bt is not None, "a law without levels keeps no frame"
        is_clean_bt = levels_bt == CLEAN
        needed = int(is_clean_bt.any(0).nonzero().max()) + 1 if is_clean_bt.any() else 0
        given = 0 if history_btchw is None else history_btchw.shape[1]
        if history_btchw is None or needed > given:
            raise SatTrainError(
                f"this model continues given frames, and {given} latent frames are given",
                expected=f"the first frames of the video, enough for {needed} latent frames",
                remedy="name a video file: args.image=clip.mp4, or prompt@@clip.mp4 in args.input_file",
            )
        if not (is_clean_bt | (levels_bt == timesteps_b[:, None])).all():
            raise SatTrainError(
                "the law of the timesteps noises some frames less than others",
                expected="frames that are clean or have the sample's timestep: others cannot be sampled",
            )
        known_btchw = history_btchw.new_zeros(tuple(latent_shape))
        known_btchw[:, :given] = history_btchw[:, : latent_shape[1]]
        return known_btchw, is_clean_bt.to(history_btchw.device)

    def signal(self, timesteps: Tensor) -> Tensor:
        """Returns the share of the signal in the variance, of the shape of the timesteps: 1 where clean."""
        return torch.where(timesteps == CLEAN, 1.0, self.alpha_bar[timesteps.clamp(min=0)])

    def noise(
        self,
        random: SampleRandomness,
        shape: tuple[int, ...],
        encoded: Mapping[str, Encoding],
        *,
        with_offset: bool,
    ) -> Tensor:
        """Draws the noise of a batch, `[b, *shape]`; `with_offset` adds what elements of a sample share."""
        eps = self.noise_law.draw(random, shape, encoded)
        if with_offset and self.offset_level:
            eps = offset_noise(eps, random.normal("offset_noise", ()), self.offset_level)
        return eps


def noised_frames(
    levels_bt: Tensor | None, counted_bt: Tensor | None, clip_ids: Sequence[str]
) -> Tensor | None:
    """Returns the frames that count in the loss: those that show the clip, and are noised.

    Args:
        levels_bt: Timestep of each frame; None: all are noised.
        counted_bt: True at frames that show the clip; None: all do.
        clip_ids: Names of the rows.

    Returns:
        bool `[b, t]`, on the CPU; None: all of them.

    Raises:
        SatTrainError: A clip is shorter than what stays clean.
    """
    if levels_bt is None or bool((levels_bt != CLEAN).all()):
        return counted_bt
    noised_bt = levels_bt != CLEAN
    counted_bt = noised_bt if counted_bt is None else noised_bt & counted_bt
    for clip, counts in zip(clip_ids, counted_bt.any(1).tolist(), strict=True):
        if not counts:
            raise SatTrainError(
                f"{clip}: no latent frame is left to predict; the law of the timesteps keeps the rest clean",
                expected="at least one frame of the clip that is noised",
                remedy="longer clips, or fewer clean frames in sigma_sampler_config",
            )
    return counted_bt

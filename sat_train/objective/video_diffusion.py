"""The objective: from encodings to losses, and from prompts to videos."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sat_train.config import Geometry
from sat_train.config.parts.loss_term_parts import DIFFUSION
from sat_train.data.batches import VideoSample
from sat_train.diffusion.dpmpp_2m import sample_dpmpp_2m
from sat_train.diffusion.guidance import Guidance
from sat_train.diffusion.known_frames import with_known_frames
from sat_train.diffusion.samplers import OnStep, Sampler
from sat_train.diffusion.timestep_laws import TimestepLaw, uniform_law
from sat_train.diffusion.timesteps import Spacing
from sat_train.distributed.seeds import derive_seed
from sat_train.distributed.transfer import to_device
from sat_train.encoding.conditions.condition import Condition, DitInputs, Encoding
from sat_train.encoding.conditions.latent_time import pad_in_time
from sat_train.encoding.conditions.randomness import DrawsAhead, PromptRandomness, SampleRandomness
from sat_train.encoding.encoded_batch import CLIP, EncodedBatch
from sat_train.models.adapter import adapters_off
from sat_train.models.encoders import Encoders
from sat_train.objective.given import (
    as_samples,
    encode_history,
    encode_samples,
    evaluation_mode,
    sampling_inputs,
    shape_to_sample,
)
from sat_train.objective.loss_inputs import LossInputs, build_loss_inputs
from sat_train.objective.loss_term import DiffusionError, WeightedTerm, weighted_sum
from sat_train.objective.noising import NoiseLaw, Noising, noised_frames
from sat_train.objective.padding import counted_frames
from sat_train.objective.pairs import add_losers
from sat_train.objective.training_inputs import LossOutput, TrainingInputs

if TYPE_CHECKING:
    from sat_train.models.dit.transformer import DiffusionTransformer

Network = Callable[..., Tensor]
_VALIDATION_SEED = derive_seed(0, "validation")


class VideoDiffusion:
    """Turns encoded batches into losses, and prompts into videos.

    It owns no parameters: the transformer's belong to the training engine, and the two encoders are frozen.
    Every random number of training comes from `(seed, purpose, global sample index)`, see `SampleRandomness`.

    Args:
        dit: The transformer; its parameters' owner is the caller.
        encoders: The frozen models, which only `generate` uses.
        conditions: The conditions of the model.
        alpha_bar: Noise schedule, float64 of shape (num_timesteps,).
        scale_factor: Latents are multiplied by this before the transformer sees them.
        posterior_sampling: Draw training latents from the autoencoder's posterior instead of taking its mean.
        offset_noise_level: Standard deviation of the noise that all elements of a sample share.
        min_snr_gamma: Upper limit of the loss weight; None for no limit.
        loss_terms: Further terms of the loss by name; `diffusion` is the model's own, with weight 1 if it is
            not there.
        timestep_law: Distribution of the training timesteps; it may have `levels`, of single frames.
        stratified: Spread the timesteps evenly over the distribution in each optimizer step; off, each
            sample's is drawn alone.
        noise_law: Distribution of the noise.
        seed: The run's seed.
        dtype: Dtype of the transformer's computation.
        device: Device of the computation.

    Attributes:
        draws: May draw the noise of the next batch before it is there.
    """

    def __init__(
        self,
        *,
        dit: DiffusionTransformer,
        encoders: Encoders,
        conditions: Sequence[Condition],
        alpha_bar: Tensor,
        scale_factor: float,
        posterior_sampling: bool = True,
        offset_noise_level: float = 0.0,
        min_snr_gamma: float | None = None,
        loss_terms: Mapping[str, WeightedTerm] | None = None,
        timestep_law: TimestepLaw = uniform_law,
        stratified: bool = False,
        noise_law: NoiseLaw | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        assert alpha_bar.dtype == torch.float64, f"alpha_bar is {alpha_bar.dtype}, not float64"
        self.dit, self.encoders, self.conditions = dit, encoders, tuple(conditions)
        self.alpha_bar = alpha_bar.cpu()
        self.scale_factor, self.posterior_sampling = scale_factor, posterior_sampling
        self.min_snr_gamma = min_snr_gamma
        self.terms = {DIFFUSION: WeightedTerm(DiffusionError()), **(loss_terms or {})}
        self.noising = Noising(
            self.alpha_bar, timestep_law, stratified, noise_law or NoiseLaw(), offset_noise_level
        )
        self.geometry: Geometry = dit.spec
        self.seed, self.dtype, self.device = seed, dtype, torch.device(device)
        self.draws = DrawsAhead(seed)

    # Training

    def training_loss(self, batch: EncodedBatch, *, network: Network | None = None) -> LossOutput:
        """Returns the training loss of a batch.

        Args:
            batch: Encoded clips and conditions.
            network: The transformer, or the engine around it; None uses `dit`.
        """
        return self.loss(self.training_inputs(batch), network=network)

    def validation_loss(
        self,
        batch: EncodedBatch,
        *,
        timesteps_b: Tensor,
        network: Network | None = None,
        with_terms: bool = False,
    ) -> LossOutput:
        """Returns a loss that depends on the weights only: given timesteps, fixed noise, nothing dropped.

        Neither the seed nor the weights and the noise of the training loss change it, so that runs of several
        recipes and seeds can be compared clip by clip.

        Args:
            batch: Encoded clips and conditions.
            timesteps_b: int64 timesteps, one for each sample.
            network: The transformer, or the engine around it; None uses `dit`.
            with_terms: Compute the other terms of the loss too.
        """
        inputs = self.validation_inputs(batch, timesteps_b, with_losers=with_terms)
        return self.loss(inputs, network=network, weighted=False, with_terms=with_terms)

    def validation_step(
        self,
        batch: EncodedBatch,
        *,
        timesteps_b: Tensor,
        network: Network | None = None,
        with_terms: bool = False,
        with_outputs: bool = False,
    ) -> LossInputs:
        """Returns what `validation_loss` reads, for views; with the `outputs` of modules."""
        inputs = self.validation_inputs(batch, timesteps_b, with_losers=with_terms)
        terms = self.terms if with_terms else {DIFFUSION: self.terms[DIFFUSION]}
        return self._loss_inputs(
            inputs, network or self.dit, terms=terms, min_snr=False, with_outputs=with_outputs
        )

    @torch.no_grad()
    def training_inputs(self, batch: EncodedBatch) -> TrainingInputs:
        """Draws all random numbers of the loss of a batch."""
        rows = add_losers(batch, self.conditions)
        random = SampleRandomness(self.seed, rows.sample_indices, self.posterior_sampling, self.draws)
        timesteps_b = self.noising.timesteps(random, rows.step_positions)
        return self._inputs(rows, random, timesteps_b, num_samples=len(batch.sample_indices), drops=True)

    @torch.no_grad()
    def validation_inputs(
        self, batch: EncodedBatch, timesteps_b: Tensor, *, with_losers: bool = False
    ) -> TrainingInputs:
        """Returns the inputs of a loss at given timesteps, with no condition dropped."""
        rows = add_losers(batch, self.conditions) if with_losers else batch
        random = SampleRandomness(_VALIDATION_SEED, rows.sample_indices, self.posterior_sampling)
        num_samples = len(batch.sample_indices)
        timesteps_b = timesteps_b.cpu().repeat(len(rows.sample_indices) // num_samples)
        return self._inputs(rows, random, timesteps_b, num_samples=num_samples, drops=False)

    def loss(
        self,
        inputs: TrainingInputs,
        *,
        network: Network | None = None,
        weighted: bool = True,
        with_terms: bool = True,
    ) -> LossOutput:
        """Predicts v once, and adds up the terms of the loss.

        Args:
            inputs: All inputs of the loss but the weights.
            network: The transformer, or the engine around it; None uses `dit`.
            weighted: Off, the loss is the plain error of v, without min-SNR; terms are only reported.
            with_terms: Off, the model's own error is the only term.
        """
        terms = self.terms if with_terms else {DIFFUSION: self.terms[DIFFUSION]}
        step = self._loss_inputs(inputs, network or self.dit, terms=terms, min_snr=weighted)
        errors = {name: term.errors(step, name=name) for name, term in terms.items()}
        loss_b = weighted_sum(errors, terms) if weighted else errors[DIFFUSION]
        details = {name: error_b.detach() for name, error_b in errors.items()}
        return LossOutput(loss_b.mean(), loss_b.detach(), inputs.timesteps_b[: step.num_samples], details)

    # Sampling

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str | VideoSample],
        *,
        image_bchw: Tensor | None = None,
        num_frames: int,
        height: int,
        width: int,
        steps: int,
        guidance: Guidance,
        sampler: Sampler = sample_dpmpp_2m,
        seeds: Sequence[int],
        spacing: Spacing = "trailing",
        network: Network | None = None,
        progress: OnStep | None = None,
    ) -> Tensor:
        """Generates one video for each prompt.

        A prompt's video depends on its own seed only, and is in float32 the one that diffusers samples with
        `torch.Generator().manual_seed(seed)`: the same numbers are drawn in the same order.

        Args:
            prompts: Captions, or samples of the size of the video with what conditions read of them, and the
                first frames that the law of the timesteps keeps clean.
            image_bchw: uint8 first frames of the size of the video, for image-to-video.
            num_frames: Pixel frames.
            height: In pixels.
            width: In pixels.
            steps: Denoising steps.
            guidance: Schedule of the guidance scale.
            sampler: The way from noise to a clean latent.
            seeds: One for each prompt.
            spacing: Spacing of the timesteps.
            network: The transformer, or the engine around it; None uses `dit`.
            progress: Called with (index of the finished step, steps).

        Returns: uint8 video_btchw on the CPU.

        Raises:
            SatTrainError: Frames or size do not fit the model.
        """
        size = num_frames, height, width
        frames, latent_shape = shape_to_sample(self.geometry, self.dit.spec.out_channels, size)
        samples = as_samples(prompts, image_bchw, size)
        generators = [torch.Generator().manual_seed(seed) for _, seed in zip(samples, seeds, strict=True)]
        random, shape = PromptRandomness(tuple(generators)), (len(prompts), *latent_shape)
        encoded = encode_samples(samples, self.conditions, self.encoders)
        inputs = sampling_inputs(self.conditions, encoded, random, shape, with_null=guidance.needs_null)
        sampler = self._keeping_history(sampler, samples, shape)
        with evaluation_mode(self.dit):
            latent = sampler(
                self._guided(network or self.dit, inputs, guidance, steps),
                self._drawn(random, latent_shape, encoded),
                alpha_bar=self.alpha_bar,
                steps=steps,
                spacing=spacing,
                on_step=progress,
            )
        return self.encoders.decode(latent[:, -frames:] / self.scale_factor)

    # Parts of the above

    def _loss_inputs(
        self,
        inputs: TrainingInputs,
        network: Network,
        *,
        terms: Mapping[str, WeightedTerm],
        min_snr: bool,
        with_outputs: bool = False,
    ) -> LossInputs:
        timesteps_b = to_device(inputs.timesteps_b, self.device)  # once, also where there are two predictions
        levels_bt = None if inputs.levels_bt is None else to_device(inputs.levels_bt, self.device)
        call = functools.partial(self._call, network, timesteps_b=timesteps_b, levels_bt=levels_bt)

        def predict(x_t: Tensor, *, return_outputs: bool = False) -> Any:
            return call(x_t, inputs=inputs.dit, return_outputs=return_outputs)

        def predict_without_adapters(x_t: Tensor) -> Tensor:
            with torch.no_grad(), adapters_off(self.dit):
                v: Tensor = predict(x_t).float()
            return v

        needs_reference = any(term.needs_reference for term in terms.values())
        return build_loss_inputs(
            inputs,
            self.noising,
            predict,
            reference=predict_without_adapters if needs_reference else None,
            with_outputs=with_outputs or len(terms) > 1,
            min_snr_gamma=self.min_snr_gamma if min_snr else None,
            decode_latent=functools.partial(self._decode, padding=inputs.padding),
        )

    def _decode(self, latent_btchw: Tensor, frames: tuple[int, int] | None, *, padding: int) -> Tensor:
        shown_btchw = latent_btchw[:, padding:][:, slice(*(frames or (None,)))]
        return self.encoders.decode_with_gradient(shown_btchw / self.scale_factor)

    def _call(
        self,
        network: Network,
        x_t: Tensor,
        timesteps_b: Tensor,
        inputs: DitInputs,
        *,
        levels_bt: Tensor | None = None,
        return_outputs: bool = False,
    ) -> Any:
        """Calls the network in its own dtype and on its device."""
        inputs = inputs.to(self.device, self.dtype)
        options = inputs.keywords()
        if levels_bt is not None:
            options["levels_bt"] = to_device(levels_bt, self.device)
        if return_outputs:
            options["return_outputs"] = True
        latent = to_device(x_t, self.device).to(self.dtype)
        return network(latent, to_device(timesteps_b, self.device), inputs.text_bld, **options)

    def _guided(
        self, network: Network, inputs: DitInputs, guidance: Guidance, steps: int
    ) -> Callable[[Tensor, int], Tensor]:
        """Returns (latent, timestep) -> guided v; with guidance both predictions are made in one batch."""

        def denoise(latent: Tensor, timestep: int) -> Tensor:
            latent = torch.cat([latent, latent]) if guidance.needs_null else latent
            timesteps_b = torch.full((len(latent),), timestep)
            levels_bt = self.noising.levels(timesteps_b, latent.shape)
            v: Tensor = self._call(network, latent, timesteps_b, inputs, levels_bt=levels_bt).float()
            if not guidance.needs_null:
                return v
            v_null, v_text = v.chunk(2)
            return v_null + guidance.scale_at(timestep, steps) * (v_text - v_null)

        return denoise

    def _keeping_history(
        self, sampler: Sampler, samples: Sequence[VideoSample], shape: tuple[int, ...]
    ) -> Sampler:
        """Returns the sampler, around the frames that the law of the timesteps keeps clean."""
        if not self.noising.has_levels:
            return sampler
        history = encode_history(samples, self.encoders, self.geometry, scale_factor=self.scale_factor)
        return with_known_frames(sampler, *self.noising.known_frames(shape, history))

    def _drawn(
        self, random: PromptRandomness, shape: tuple[int, ...], encoded: Mapping[str, Encoding]
    ) -> Callable[[], Tensor]:
        """Returns a function that draws noise: first of the noise law, then of unit normal numbers."""
        laws = itertools.chain([self.noising.noise_law], itertools.repeat(NoiseLaw()))
        return lambda: next(laws).draw(random, shape, encoded).to(self.device)

    def _inputs(
        self,
        batch: EncodedBatch,
        random: SampleRandomness,
        timesteps_b: Tensor,
        *,
        num_samples: int,
        drops: bool,
    ) -> TrainingInputs:
        batch = batch.to(self.device)
        latent = random.latent(batch.encodings[CLIP], "posterior")
        x0 = pad_in_time(self.scale_factor * latent, self.geometry)
        inputs = []
        for condition in self.conditions:
            encoded: Encoding = batch.encodings.get(condition.name, {})
            if drops and condition.drop_probability:
                dropped_b = random.chance(condition.drop_purpose, condition.drop_probability)
                encoded = condition.drop(encoded, to_device(dropped_b, self.device))
            inputs.append(condition.inputs(encoded, random, tuple(x0.shape)))
        encodings = {name: encoded for name, encoded in batch.encodings.items() if name != CLIP}
        levels_bt = self.noising.levels(timesteps_b, x0.shape)
        counted_bt = noised_frames(
            levels_bt, counted_frames(batch.num_shown, latent.shape[1], self.geometry), batch.clip_ids
        )
        eps = self.noising.noise(random, tuple(x0.shape[1:]), encodings, with_offset=drops)
        return TrainingInputs(
            x0_btchw=x0,
            eps_btchw=to_device(eps, self.device),
            timesteps_b=timesteps_b,
            levels_bt=levels_bt,
            dit=DitInputs.merged(inputs),
            counted_bt=None if counted_bt is None else to_device(counted_bt, self.device),
            encoded=encodings,
            random=random,
            padding=x0.shape[1] - latent.shape[1],
            num_samples=num_samples,
        )

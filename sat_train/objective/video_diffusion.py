"""The objective: from encodings to losses, and from prompts to videos."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sat_train.config import Geometry
from sat_train.config.parts.loss_term_parts import DIFFUSION
from sat_train.data.batches import VideoSample
from sat_train.data.sampler import AugmentationKey
from sat_train.diffusion.dpmpp_2m import sample_dpmpp_2m
from sat_train.diffusion.guidance import Guidance
from sat_train.diffusion.loss import min_snr_weight, offset_noise
from sat_train.diffusion.parameterization import add_noise, v_target
from sat_train.diffusion.samplers import OnStep, Sampler
from sat_train.diffusion.timestep_laws import TimestepLaw, uniform_law
from sat_train.diffusion.timesteps import Spacing, stratify, timesteps_at
from sat_train.distributed.seeds import derive_seed
from sat_train.encoding.conditions.condition import Condition, DitInputs, Encoding
from sat_train.encoding.conditions.latent_time import pad_in_time
from sat_train.encoding.conditions.randomness import PromptRandomness, SampleRandomness
from sat_train.encoding.encoded_batch import CLIP, EncodedBatch, stack_rows
from sat_train.models.adapter import adapters_off
from sat_train.models.encoders import Encoders
from sat_train.objective.loss_inputs import LossInputs
from sat_train.objective.loss_term import DiffusionError, WeightedTerm, weighted_sum
from sat_train.objective.padding import counted_frames
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
        timestep_law: Distribution of the training timesteps.
        stratified: Spread the timesteps evenly over the distribution in each optimizer step; off, each
            sample's is drawn alone.
        seed: The run's seed.
        dtype: Dtype of the transformer's computation.
        device: Device of the computation.
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
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        assert alpha_bar.dtype == torch.float64, f"alpha_bar is {alpha_bar.dtype}, not float64"
        self.dit, self.encoders, self.conditions = dit, encoders, tuple(conditions)
        self.alpha_bar = alpha_bar.cpu()
        self.scale_factor, self.posterior_sampling = scale_factor, posterior_sampling
        self.offset_noise_level, self.min_snr_gamma = offset_noise_level, min_snr_gamma
        self.terms = {DIFFUSION: WeightedTerm(DiffusionError()), **(loss_terms or {})}
        self.timestep_law, self.stratified = timestep_law, stratified
        self.geometry: Geometry = dit.spec
        self.seed, self.dtype, self.device = seed, dtype, torch.device(device)

    # Training

    def training_loss(self, batch: EncodedBatch, *, network: Network | None = None) -> LossOutput:
        """Returns the training loss of a batch.

        Args:
            batch: Encoded clips and conditions.
            network: The transformer, or the engine around it; None uses `dit`.
        """
        return self.loss(self.training_inputs(batch), network=network)

    def validation_loss(
        self, batch: EncodedBatch, *, timesteps_b: Tensor, network: Network | None = None
    ) -> LossOutput:
        """Returns a loss that depends on the weights only: given timesteps, fixed noise, nothing dropped.

        Neither the seed nor the weights and the noise of the training loss change it, so that runs of several
        recipes and seeds can be compared clip by clip.

        Args:
            batch: Encoded clips and conditions.
            timesteps_b: int64 timesteps, one for each sample.
            network: The transformer, or the engine around it; None uses `dit`.
        """
        return self.loss(self.validation_inputs(batch, timesteps_b), network=network, weighted=False)

    @torch.no_grad()
    def training_inputs(self, batch: EncodedBatch) -> TrainingInputs:
        """Draws all random numbers of the loss of a batch."""
        random = SampleRandomness(self.seed, batch.sample_indices, self.posterior_sampling)
        return self._inputs(batch, random, self._timesteps(batch, random), drops=True)

    @torch.no_grad()
    def validation_inputs(self, batch: EncodedBatch, timesteps_b: Tensor) -> TrainingInputs:
        """Returns the inputs of a loss at given timesteps, with no condition dropped."""
        random = SampleRandomness(_VALIDATION_SEED, batch.sample_indices, self.posterior_sampling)
        return self._inputs(batch, random, timesteps_b.cpu(), drops=False)

    def loss(
        self, inputs: TrainingInputs, *, network: Network | None = None, weighted: bool = True
    ) -> LossOutput:
        """Predicts v once, and adds up the terms of the loss; not `weighted`, it is the plain error of v."""
        step = self._loss_inputs(inputs, network or self.dit, min_snr=weighted)
        errors = {name: term.errors(step, name=name) for name, term in self.terms.items()}
        loss_b = weighted_sum(errors, self.terms) if weighted else errors[DIFFUSION]
        terms = {name: error_b.detach() for name, error_b in errors.items()}
        return LossOutput(loss_b.mean(), loss_b.detach(), inputs.timesteps_b[: step.num_samples], terms)

    # Sampling

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
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

        A prompt's video depends on its own seed only, not on the other prompts. In float32 it is the video
        that diffusers samples with `torch.Generator().manual_seed(seed)`: the same numbers are drawn in the
        same order.

        Args:
            prompts: Captions.
            image_bchw: uint8 first frames of the size of the video, for image-to-video.
            num_frames: Pixel frames.
            height: Of the video, in pixels.
            width: Of the video, in pixels.
            steps: Denoising steps.
            guidance: Schedule of the guidance scale.
            sampler: The way from noise to a clean latent.
            seeds: One for each prompt.
            spacing: Spacing of the timesteps.
            network: The transformer, or the engine around it; None uses `dit`.
            progress: Called with (index of the finished step, steps).

        Returns:
            uint8 video_btchw on the CPU.

        Raises:
            SatTrainError: The number of frames or the size does not fit the model.
        """
        assert len(prompts) == len(seeds), f"{len(prompts)} prompts but {len(seeds)} seeds"
        frames, latent_shape = self._latent_shape(num_frames, height, width)
        random = PromptRandomness(tuple(torch.Generator().manual_seed(seed) for seed in seeds))
        samples = as_samples(prompts, image_bchw)
        inputs = self._sampling_inputs(samples, random, latent_shape, with_null=guidance.needs_null)
        with self._evaluation_mode():
            latent = sampler(
                self._guided(network or self.dit, inputs, guidance, steps),
                lambda: random.normal("noise", latent_shape).to(self.device),
                alpha_bar=self.alpha_bar,
                steps=steps,
                spacing=spacing,
                on_step=progress,
            )
        return self.encoders.decode(latent[:, -frames:] / self.scale_factor)

    # Parts of the above

    def _loss_inputs(self, inputs: TrainingInputs, network: Network, *, min_snr: bool) -> LossInputs:
        """Runs the network once, and before it, where a term asks for it, once without adapters."""
        x0, eps, timesteps_b = inputs.x0_btchw, inputs.eps_btchw, inputs.timesteps_b
        alpha_bar_b = self.alpha_bar[timesteps_b]
        x_t = add_noise(x0, eps, alpha_bar_b)
        predict = functools.partial(self._call, x_t=x_t, timesteps_b=timesteps_b, inputs=inputs.dit)
        reference = None
        if any(term.needs_reference for term in self.terms.values()):
            # before the prediction: ZeRO-3 expects a backward after a forward with gradient
            with torch.no_grad(), adapters_off(self.dit):
                reference = predict(network).float()
        if len(self.terms) > 1:
            v_pred, outputs = predict(network, return_outputs=True)
        else:
            v_pred, outputs = predict(network), {}
        return LossInputs(
            x0_btchw=x0,
            eps_btchw=eps,
            x_t_btchw=x_t,
            timesteps_b=timesteps_b,
            levels_bt=None,
            alpha_bar_b=alpha_bar_b,
            noise_alpha_bar=alpha_bar_b,
            v_pred_btchw=v_pred.float(),
            v_true_btchw=v_target(x0, eps, alpha_bar_b),
            counted_bt=inputs.counted_bt,
            encoded=inputs.encoded,
            outputs=outputs,
            random=inputs.random,
            num_samples=len(timesteps_b),
            min_snr_b=self._min_snr(alpha_bar_b) if min_snr else None,
            reference=reference,
            decode_latent=functools.partial(self._decode, padding=inputs.padding),
        )

    def _min_snr(self, alpha_bar_b: Tensor) -> Tensor | None:
        gamma = self.min_snr_gamma
        return None if gamma is None else min_snr_weight(alpha_bar_b, gamma).to(self.device)

    def _decode(self, latent_btchw: Tensor, frames: tuple[int, int] | None, *, padding: int) -> Tensor:
        shown_btchw = latent_btchw[:, padding:][:, slice(*(frames or (None,)))]
        return self.encoders.decode_with_gradient(shown_btchw / self.scale_factor)

    def _predict(self, network: Network, x_t: Tensor, timesteps_b: Tensor, inputs: DitInputs) -> Tensor:
        """Returns the prediction as float32."""
        v: Tensor = self._call(network, x_t, timesteps_b, inputs).float()
        return v

    def _call(
        self,
        network: Network,
        x_t: Tensor,
        timesteps_b: Tensor,
        inputs: DitInputs,
        *,
        return_outputs: bool = False,
    ) -> Any:
        """Calls the network in its own dtype and on its device."""
        inputs = inputs.to(self.device, self.dtype)
        options = inputs.keywords()
        if return_outputs:
            options["return_outputs"] = True
        latent, timesteps_b = x_t.to(self.device, self.dtype), timesteps_b.to(self.device)
        return network(latent, timesteps_b, inputs.text_bld, **options)

    def _guided(
        self, network: Network, inputs: DitInputs, guidance: Guidance, steps: int
    ) -> Callable[[Tensor, int], Tensor]:
        """Returns (latent, timestep) -> guided v; with guidance both predictions are made in one batch."""

        def denoise(latent: Tensor, timestep: int) -> Tensor:
            latent = torch.cat([latent, latent]) if guidance.needs_null else latent
            v = self._predict(network, latent, torch.full((len(latent),), timestep), inputs)
            if not guidance.needs_null:
                return v
            v_null, v_text = v.chunk(2)
            return v_null + guidance.scale_at(timestep, steps) * (v_text - v_null)

        return denoise

    def _latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, tuple[int, ...]]:
        """Returns the latent frames of a video, and the shape of its latent with the padding in front."""
        self.geometry.check_size(height, width, subject="sample")
        self.geometry.check_frames(num_frames, subject="sample")
        latent = self.geometry.latent(num_frames, height, width)
        shape = (latent.padded_frames, self.dit.spec.out_channels, latent.height, latent.width)
        return latent.frames, shape

    def _sampling_inputs(
        self,
        samples: Sequence[VideoSample],
        random: PromptRandomness,
        latent_shape: tuple[int, ...],
        *,
        with_null: bool,
    ) -> DitInputs:
        """Returns the inputs of prompts; with guidance, first those without the conditions that guide."""
        shape, every = (len(samples), *latent_shape), torch.ones(len(samples), dtype=torch.bool)
        null, full = [], []
        for condition in self.conditions:
            encoded = [condition.encoded(sample, self.encoders) for sample in samples]
            stacked = {part: stack_rows([each[part] for each in encoded]) for part in condition.tensors}
            full.append(condition.inputs(stacked, random, shape))
            null.append(full[-1])
            if with_null and condition.guides:
                dropped = condition.drop(stacked, every.to(self.device))
                null[-1] = condition.inputs(dropped, random, shape)
        if not with_null:
            return DitInputs.merged(full)
        return DitInputs.cat([DitInputs.merged(null), DitInputs.merged(full)])

    def _inputs(
        self, batch: EncodedBatch, random: SampleRandomness, timesteps_b: Tensor, *, drops: bool
    ) -> TrainingInputs:
        batch = batch.to(self.device)
        latent = random.latent(batch.encodings[CLIP], "posterior")
        x0 = pad_in_time(self.scale_factor * latent, self.geometry)
        inputs = []
        for condition in self.conditions:
            encoded: Encoding = batch.encodings.get(condition.name, {})
            if drops and condition.drop_probability:
                dropped_b = random.chance(condition.drop_purpose, condition.drop_probability)
                encoded = condition.drop(encoded, dropped_b.to(self.device))
            inputs.append(condition.inputs(encoded, random, tuple(x0.shape)))
        counted_bt = self._counted_frames(batch.num_shown, num_latent_frames=latent.shape[1])
        eps = self._noise_like(x0, random, offset_level=self.offset_noise_level if drops else 0.0)
        return TrainingInputs(
            x0,
            eps,
            timesteps_b,
            DitInputs.merged(inputs),
            counted_bt,
            encoded={name: encoded for name, encoded in batch.encodings.items() if name != CLIP},
            random=random,
            padding=x0.shape[1] - latent.shape[1],
        )

    def _counted_frames(self, num_shown: Sequence[int], *, num_latent_frames: int) -> Tensor | None:
        """Returns a mask of the latent frames that count, without those that only pad a short clip."""
        counted_bt = counted_frames(num_shown, num_latent_frames, self.geometry)
        return None if counted_bt is None else counted_bt.to(self.device)

    def _noise_like(self, x0: Tensor, random: SampleRandomness, *, offset_level: float) -> Tensor:
        eps = random.normal("noise", tuple(x0.shape[1:]))
        if offset_level:
            eps = offset_noise(eps, random.normal("offset_noise", ()), offset_level)
        return eps.to(self.device)

    def _timesteps(self, batch: EncodedBatch, random: SampleRandomness) -> Tensor:
        uniform_b = random.uniform("timestep")
        if self.stratified:
            strata_b = random.strata("timestep_strata", batch.step_positions)
            num_strata_b = torch.tensor([position.size for position in batch.step_positions])
            uniform_b = stratify(uniform_b, strata_b, num_strata_b)
        return timesteps_at(self.timestep_law(uniform_b), len(self.alpha_bar))

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        was_training = self.dit.training
        self.dit.eval()
        try:
            yield
        finally:
            self.dit.train(was_training)


def as_samples(prompts: Sequence[str], image_bchw: Tensor | None) -> list[VideoSample]:
    """Returns prompts as samples for the conditions: each with a caption and, if given, a first frame."""
    videos = torch.empty(len(prompts), 0) if image_bchw is None else image_bchw[:, None]
    key = AugmentationKey(0, 0)  # nothing about a prompt is augmented
    return [
        VideoSample("sample", 0, 0, video, prompt, None, key, training=False)
        for prompt, video in zip(prompts, videos, strict=True)
    ]

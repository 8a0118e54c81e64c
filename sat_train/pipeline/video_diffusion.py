"""The model as training and sampling see it: encoders, transformer and diffusion together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sat_train.data.augmentation_key import AugmentationKey
from sat_train.diffusion.guidance import Guidance
from sat_train.diffusion.loss import min_snr_weight, offset_noise, v_mse_per_sample
from sat_train.diffusion.parameterization import add_noise, v_target
from sat_train.diffusion.samplers import OnStep, sample_ddim, sample_dpmpp_2m
from sat_train.diffusion.timesteps import Spacing, stratified_timesteps, uniform_timesteps
from sat_train.distributed.seeds import derive_seed
from sat_train.encoding.encoders import Encoders, conditioning_image, pixels_to_unit
from sat_train.encoding.image_latent import image_condition, sample_posterior
from sat_train.encoding.randomness import SampleRandomness
from sat_train.models.geometry import check_size, counted_frames, latent_frames, pad_in_time, padding_frames
from sat_train.pipeline.training_inputs import LossOutput, TrainingInputs

if TYPE_CHECKING:
    from sat_train.data.batch import VideoBatch
    from sat_train.encoding.encoders import LoadEncoders
    from sat_train.models.dit.transformer import DiffusionTransformer
    from sat_train.models.text.t5 import T5TextEncoder
    from sat_train.models.vae.video_vae import VideoVAE

Network = Callable[..., Tensor]
Sampler = Literal["DDIM", "DPMPP2M"]
SAMPLERS = {"DDIM": sample_ddim, "DPMPP2M": sample_dpmpp_2m}


class VideoDiffusion:
    """Turns batches into losses, and prompts into videos.

    It owns no parameters: the transformer's belong to the training engine, and the two encoders are frozen.
    Every random number of training comes from `(seed, purpose, global sample index)`, see `SampleRandomness`.

    Args:
        dit: The transformer; its parameters' owner is the caller.
        vae: Frozen video autoencoder; None when every batch comes from the cache and nothing is sampled.
        text_encoder: Frozen text encoder; None when every batch comes from the cache and nothing is sampled.
        alpha_bar: Noise schedule, float64 of shape (num_timesteps,).
        scale_factor: Latents are multiplied by this before the transformer sees them.
        image_latent_scale: The factor of the image condition's latent.
        noised_image_input: Image-to-video.
        noised_image_dropout: Share of the training samples whose image condition is dropped.
        caption_dropout: Share of the training samples whose caption is dropped (`ucg_rate`).
        null_condition: What stands for a dropped caption, in training and in guidance: zeros, or the encoded
            empty prompt.
        null_text_ld: The encoded empty prompt, where there is no text encoder to make it.
        posterior_sampling: Draw training latents from the autoencoder's posterior instead of taking its mean.
        offset_noise_level: Standard deviation of the noise that all elements of a sample share.
        min_snr_gamma: Cap of the loss weight; None for none.
        timestep_sampling: `uniform` draws each sample's timestep alone, `stratified` spreads them over the
            optimizer step.
        temporal_compression: Pixel frames in one latent frame after the first.
        ofs: The `ofs` input of CogVideoX1.5-I2V, 2.0; None for models without it.
        seed: The run's seed.
        dtype: What the transformer computes in.
        device: Where everything is computed. The encoders must be there already.
        load_encoders: As `load` of `Encoders`.
    """

    def __init__(
        self,
        *,
        dit: DiffusionTransformer,
        vae: VideoVAE | None,
        text_encoder: T5TextEncoder | None,
        alpha_bar: Tensor,
        scale_factor: float,
        image_latent_scale: float,
        noised_image_input: bool = False,
        noised_image_dropout: float = 0.0,
        caption_dropout: float = 0.0,
        null_condition: Literal["zero", "empty_prompt"] = "zero",
        null_text_ld: Tensor | None = None,
        posterior_sampling: bool = True,
        offset_noise_level: float = 0.0,
        min_snr_gamma: float | None = None,
        timestep_sampling: Literal["uniform", "stratified"] = "uniform",
        temporal_compression: int = 4,
        ofs: float | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        load_encoders: LoadEncoders | None = None,
    ) -> None:
        assert alpha_bar.dtype == torch.float64, f"alpha_bar is {alpha_bar.dtype}, not float64"
        self.dit = dit
        self.encoders = Encoders(
            vae=vae,
            text_encoder=text_encoder,
            null_condition=null_condition,
            null_text_ld=null_text_ld,
            dtype=dtype,
            device=torch.device(device),
            load=load_encoders,
        )
        self.alpha_bar = alpha_bar.cpu()
        self.scale_factor, self.image_latent_scale = scale_factor, image_latent_scale
        self.noised_image_input, self.noised_image_dropout = noised_image_input, noised_image_dropout
        self.caption_dropout, self.posterior_sampling = caption_dropout, posterior_sampling
        self.offset_noise_level, self.min_snr_gamma = offset_noise_level, min_snr_gamma
        self.timestep_sampling = timestep_sampling
        self.temporal_compression, self.ofs = temporal_compression, ofs
        self.seed, self.dtype, self.device = seed, dtype, torch.device(device)
        self.patch_t = dit.patch_size[0]

    # Training

    def training_loss(self, batch: VideoBatch, *, network: Network | None = None) -> LossOutput:
        """Returns the loss that is optimized.

        Args:
            batch: Clips with captions, or their cached encodings.
            network: The transformer, or the engine around it; None takes `dit`.
        """
        return self.loss(self.training_inputs(batch), network=network)

    def validation_loss(
        self, batch: VideoBatch, *, timesteps_b: Tensor, network: Network | None = None
    ) -> LossOutput:
        """Returns a loss that moves only with the weights: timesteps given, noise fixed, nothing dropped.

        Args:
            batch: Clips with captions, or their cached encodings.
            timesteps_b: int64 timesteps, one for each sample.
            network: The transformer, or the engine around it; None takes `dit`.
        """
        return self.loss(self.validation_inputs(batch, timesteps_b), network=network)

    @torch.no_grad()
    def training_inputs(self, batch: VideoBatch) -> TrainingInputs:
        """Encodes a batch and draws everything that is random about its loss."""
        random = SampleRandomness(self.seed, batch.sample_indices)
        text = self._batch_text(batch)
        dropped = random.chance("caption_drop", self.caption_dropout).to(self.device)
        text = torch.where(dropped[:, None, None], self.encoders.null_text_like(text), text)
        x0 = self._clip_latent(batch, random)
        image = None
        if self.noised_image_input:
            image = self._image_latent(batch, random, num_latent_frames=x0.shape[1], noised=True)
            kept = ~random.chance("image_drop", self.noised_image_dropout).to(self.device)
            image = image * kept[:, None, None, None, None]
        eps, timesteps_b = self._noise_like(x0, random), self._timesteps(batch, random)
        return TrainingInputs(x0, eps, timesteps_b, text, image, self._counted_frames(batch))

    @torch.no_grad()
    def validation_inputs(self, batch: VideoBatch, timesteps_b: Tensor) -> TrainingInputs:
        """As `training_inputs`, with the timesteps given, no condition dropped and the image as it is."""
        random = SampleRandomness(derive_seed(self.seed, "validation"), batch.sample_indices)
        x0 = self._clip_latent(batch, random)
        image = None
        if self.noised_image_input:
            image = self._image_latent(batch, random, num_latent_frames=x0.shape[1], noised=False)
        eps, text = self._noise_like(x0, random), self._batch_text(batch)
        return TrainingInputs(x0, eps, timesteps_b.cpu(), text, image, self._counted_frames(batch))

    def loss(self, inputs: TrainingInputs, *, network: Network | None = None) -> LossOutput:
        """Predicts v once and compares it with the target."""
        alpha_bar_b = self.alpha_bar[inputs.timesteps_b]
        x_t = add_noise(inputs.x0_btchw, inputs.eps_btchw, alpha_bar_b)
        v_pred = self._predict(
            network or self.dit, x_t, inputs.timesteps_b, inputs.text_bld, inputs.image_latent_btchw
        )
        v_true = v_target(inputs.x0_btchw, inputs.eps_btchw, alpha_bar_b)
        loss_b = v_mse_per_sample(v_pred, v_true, inputs.counted_bt)
        if self.min_snr_gamma is not None:
            loss_b = loss_b * min_snr_weight(alpha_bar_b, self.min_snr_gamma).to(loss_b.device)
        return LossOutput(loss_b.mean(), loss_b.detach(), inputs.timesteps_b)

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
        sampler: Sampler = "DPMPP2M",
        seeds: Sequence[int],
        spacing: Spacing = "trailing",
        network: Network | None = None,
        progress: OnStep | None = None,
    ) -> Tensor:
        """Draws one video for each prompt.

        A prompt's video depends on its own seed only, not on the other prompts. In float32 it is the video
        that diffusers draws with `torch.Generator().manual_seed(seed)`: the same numbers are taken in the
        same order.

        Args:
            prompts: Captions.
            image_bchw: uint8 first frames of the size of the video, for image-to-video.
            num_frames: Pixel frames.
            height: Of the video, in pixels.
            width: Of the video, in pixels.
            steps: Denoising steps.
            guidance: How the prompt is emphasised.
            sampler: `DDIM` is deterministic after the first noise; `DPMPP2M` adds noise on the way.
            seeds: One for each prompt.
            spacing: Which timesteps are visited.
            network: The transformer, or the engine around it; None takes `dit`.
            progress: Called with (index of the finished step, steps).

        Returns:
            uint8 video_btchw on the CPU.

        Raises:
            SatTrainError: The number of frames or the size does not fit the model.
        """
        assert len(prompts) == len(seeds), f"{len(prompts)} prompts but {len(seeds)} seeds"
        frames, latent_shape = self._latent_shape(num_frames, height, width)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        image = self._sampled_image_condition(image_bchw, generators, num_latent_frames=latent_shape[0])
        with self._evaluation_mode():
            latent = SAMPLERS[sampler](
                self._guided(network or self.dit, self.encoders.text(prompts), image, guidance, steps),
                lambda: self._draw(generators, latent_shape),
                alpha_bar=self.alpha_bar,
                steps=steps,
                spacing=spacing,
                on_step=progress,
            )
        return self.encoders.decode(latent[:, -frames:] / self.scale_factor)

    # Parts of the above

    def _predict(
        self, network: Network, x_t: Tensor, timesteps_b: Tensor, text: Tensor, image: Tensor | None
    ) -> Tensor:
        """Calls the network in its own dtype and device; returns float32."""
        ofs_b = None if self.ofs is None else torch.full((len(x_t),), self.ofs)
        return network(
            self._to_network(x_t),
            timesteps_b.to(self.device),
            self._to_network(text),
            image_latent_btchw=self._to_network(image),
            ofs_b=self._to_network(ofs_b),
        ).float()

    def _to_network(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.device, self.dtype)

    def _guided(
        self, network: Network, text: Tensor, image: Tensor | None, guidance: Guidance, steps: int
    ) -> Callable[[Tensor, int], Tensor]:
        """Returns (latent, timestep) -> guided v; with guidance both predictions are made in one batch."""
        if guidance.needs_null:
            text = torch.cat([self.encoders.null_text_like(text), text])
            image = None if image is None else torch.cat([image, image])

        def denoise(latent: Tensor, timestep: int) -> Tensor:
            latent = torch.cat([latent, latent]) if guidance.needs_null else latent
            v = self._predict(network, latent, torch.full((len(latent),), timestep), text, image)
            if not guidance.needs_null:
                return v
            v_null, v_text = v.chunk(2)
            return v_null + guidance.scale_at(timestep, steps) * (v_text - v_null)

        return denoise

    def _latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, tuple[int, ...]]:
        """Returns the latent frames of a video, and the shape of its latent with the padding in front."""
        vae, (patch_t, patch_h, patch_w) = self.encoders.vae, self.dit.patch_size
        ratio = vae.spatial_compression
        check_size(height, width, multiple=(ratio * patch_h, ratio * patch_w), subject="sample")
        frames = latent_frames(num_frames, compression=vae.temporal_compression, subject="sample")
        padded = frames + padding_frames(frames, patch_t)
        return frames, (padded, vae.z_channels, height // ratio, width // ratio)

    def _sampled_image_condition(
        self, image_bchw: Tensor | None, generators: list[torch.Generator], *, num_latent_frames: int
    ) -> Tensor | None:
        """Returns the condition that a given image makes; its posterior is the first thing that is drawn."""
        assert (image_bchw is not None) == self.noised_image_input, "an image goes with image-to-video alone"
        if image_bchw is None:
            return None
        mean, logvar = self.encoders.image_moments(pixels_to_unit(image_bchw, self.device))
        latent = sample_posterior(mean, logvar, self._draw(generators, tuple(mean.shape[1:])))
        return image_condition(latent, scale=self.image_latent_scale, num_latent_frames=num_latent_frames)

    def _batch_text(self, batch: VideoBatch) -> Tensor:
        if batch.cached is not None:
            return batch.cached.text_bld.to(self.device, self.dtype)
        return self.encoders.text(batch.captions)

    def _clip_latent(self, batch: VideoBatch, random: SampleRandomness) -> Tensor:
        """Returns the scaled latent of the clips, padded in time, float32."""
        if batch.cached is not None:
            mean, logvar = batch.cached.mean_btchw, batch.cached.logvar_btchw
        else:
            assert batch.video_btchw is not None, "a batch has pixels or encodings"
            mean, logvar = self.encoders.video_moments(batch.video_btchw, subject=", ".join(batch.clip_ids))
        return pad_in_time(
            self.scale_factor * self._posterior(mean, logvar, random, "posterior"), self.patch_t
        )

    def _counted_frames(self, batch: VideoBatch) -> Tensor | None:
        """Returns which latent frames count: not those that only repeat the last frame of a short clip."""
        if batch.cached is not None:
            num_latent_frames = batch.cached.mean_btchw.shape[1]
        else:
            assert batch.video_btchw is not None, "a batch has pixels or encodings"
            num_latent_frames = (batch.video_btchw.shape[1] - 1) // self.temporal_compression + 1
        counted_bt = counted_frames(
            batch.num_shown,
            num_latent_frames=num_latent_frames,
            compression=self.temporal_compression,
            patch_t=self.patch_t,
        )
        return None if counted_bt is None else counted_bt.to(self.device)

    def _image_latent(
        self, batch: VideoBatch, random: SampleRandomness, *, num_latent_frames: int, noised: bool
    ) -> Tensor:
        """Returns the image condition of a training or validation batch, float32."""
        if batch.cached is not None:
            mean, logvar = batch.cached.image_latent_btchw, batch.cached.image_logvar_btchw
            assert mean is not None, "image-to-video needs the image's latent in the cache"
        else:
            mean, logvar = self._image_moments(batch, noised=noised)
        latent = self._posterior(mean, logvar, random, "image_posterior")
        return image_condition(latent, scale=self.image_latent_scale, num_latent_frames=num_latent_frames)

    def _image_moments(self, batch: VideoBatch, *, noised: bool) -> tuple[Tensor, Tensor]:
        augmentations = batch.augmentations or tuple(
            AugmentationKey(self.seed, index) for index in batch.sample_indices
        )
        return self.encoders.image_moments(
            conditioning_image(batch, augmentations if noised else (), self.device)
        )

    def _posterior(
        self, mean: Tensor, logvar: Tensor | None, random: SampleRandomness, purpose: str
    ) -> Tensor:
        """Draws latents, float32, or takes their mean where the variance is unknown or not wanted."""
        mean = mean.to(self.device, torch.float32)
        if logvar is None or not self.posterior_sampling:
            return mean
        eps = random.normal(purpose, tuple(mean.shape[1:])).to(self.device)
        return sample_posterior(mean, logvar.to(self.device, torch.float32), eps)

    def _noise_like(self, x0: Tensor, random: SampleRandomness) -> Tensor:
        eps = random.normal("noise", tuple(x0.shape[1:]))
        if self.offset_noise_level:
            eps = offset_noise(eps, random.normal("offset_noise", ()), self.offset_noise_level)
        return eps.to(self.device)

    def _timesteps(self, batch: VideoBatch, random: SampleRandomness) -> Tensor:
        uniform_b, num_timesteps = random.uniform("timestep"), len(self.alpha_bar)
        if self.timestep_sampling == "uniform":
            return uniform_timesteps(uniform_b, num_timesteps)
        strata_b = random.strata("timestep_strata", batch.step_positions)
        num_strata_b = torch.tensor([position.size for position in batch.step_positions])
        return stratified_timesteps(uniform_b, strata_b, num_strata_b, num_timesteps)

    def _draw(self, generators: list[torch.Generator], shape: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(
            self.device
        )

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        was_training = self.dit.training
        self.dit.eval()
        try:
            yield
        finally:
            self.dit.train(was_training)

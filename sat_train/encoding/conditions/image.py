"""Image-to-video: the first frame as a condition, with its noise, drop-out, scale and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.encoding.cache.entries import CacheEntry, SampleFacts
from sat_train.encoding.cache.key import image_key
from sat_train.encoding.conditions.condition import Condition, DitInputs, Encoding
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.models.encoders import Encoders, pixels_to_unit

_RELEASED_NOISE = (-3.0, 0.5)


class ImageCondition(Condition):
    """The first frame's latent, in the first frame of additional channels, followed by zeros.

    Args:
        scale: `image_latent_scale`. Diffusers multiplies by the autoencoder's factor for CogVideoX-5B-I2V
            and divides by it for 1.5-I2V; CogVideo trains both with the product, and samples with neither.
        drop_probability: Share of the training samples whose image is dropped (`noised_image_dropout`).
        noise_log_mean: Mean of the logarithm of the noise level of each image in training.
        noise_log_std: Its standard deviation.

    Source: diffusers 0.42 `CogVideoXImageToVideoPipeline.prepare_latents`.
    """

    name = "image"
    tensors = frozenset({"mean", "logvar"})
    drop_purpose = "image_drop"
    augments = True
    reads_caption = False

    def __init__(
        self,
        *,
        scale: float,
        drop_probability: float = 0.0,
        noise_log_mean: float = _RELEASED_NOISE[0],
        noise_log_std: float = _RELEASED_NOISE[1],
    ) -> None:
        self.scale, self.drop_probability = scale, drop_probability
        self.noise = (noise_log_mean, noise_log_std)

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Returns the moments of the first frame, noised in training, (1, c, h, w)."""
        image = pixels_to_unit(sample.conditioning_image_chw(), encoders.device)
        if sample.training:  # the numbers are drawn on the CPU
            eps = torch.randn(image.shape, generator=sample.generator("image_noise"))
            log_mean, log_std = self.noise
            log_sigma = log_mean + log_std * torch.randn((), generator=sample.generator("image_noise_level"))
            image = noise_image(image, eps.to(image.device), log_sigma.to(image.device))
        return encoders.frames(image[None])

    def entry(self, facts: SampleFacts) -> CacheEntry:
        """Returns the entry of the first frame, keyed in training by its noise too."""
        image, noise = facts.record.image, self._noise_key(facts) if facts.training else None
        pixels = facts.clip if image is None else facts.picture(image)
        key = image_key(pixels=pixels.key, noise=noise, vae=facts.encoder_digests.vae)
        return CacheEntry(key, replace(pixels.info, kind="image"))

    def _noise_key(self, facts: SampleFacts) -> tuple[float, ...]:
        return facts.view if self.noise == _RELEASED_NOISE else (*facts.view, *self.noise)

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Returns the scaled latent in the first of the frames, padding in front included."""
        latent = self.scale * random.latent(encoded, "image_posterior")
        b, t, c, h, w = latent_shape
        return DitInputs(image_latent_btchw=torch.cat([latent, latent.new_zeros(b, t - 1, c, h, w)], dim=1))


class OfsCondition(Condition):
    """The `ofs` input of CogVideoX1.5-I2V, the same number for all samples.

    Args:
        value: The number.
    """

    name = "ofs"

    def __init__(self, value: float) -> None:
        self.value = value

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Returns the number for each sample."""
        return DitInputs(ofs_b=torch.full((latent_shape[0],), self.value))


def noise_image(image_chw: Tensor, eps_chw: Tensor, log_sigma: Tensor) -> Tensor:
    """Noises a first frame a little, so that the model does not learn to copy it.

    Args:
        image_chw: Pixels in [-1, 1], float32.
        eps_chw: Unit normal noise of the image's shape.
        log_sigma: Logarithm of the standard deviation of the noise: each image has its own.

    Returns:
        Noised image, float32.

    Source: zai-org/CogVideo@7a1af71 `sat/diffusion_video.py` add_noise_to_first_frame.
    """
    return image_chw + log_sigma.exp() * eps_chw

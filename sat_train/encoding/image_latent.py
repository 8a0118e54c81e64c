"""Image-to-video: the one way the image condition is made, in training, validation and sampling."""

from __future__ import annotations

import torch
from torch import Tensor

# log of the standard deviation of the noise on the first frame, in pixels of [-1, 1]
NOISE_LOG_MEAN, NOISE_LOG_STD = -3.0, 0.5


def noise_image(image_bchw: Tensor, eps_bchw: Tensor, log_sigma_eps_b: Tensor) -> Tensor:
    """Noises a first frame a little, so that the model does not learn to copy it.

    Args:
        image_bchw: Pixels in [-1, 1], float32.
        eps_bchw: Unit normal noise of the image's shape.
        log_sigma_eps_b: One unit normal number for each sample: each has its own noise level.

    Returns:
        Noised image, float32.

    Source: zai-org/CogVideo@7a1af71 `sat/diffusion_video.py` add_noise_to_first_frame.
    """
    sigma = (NOISE_LOG_MEAN + NOISE_LOG_STD * log_sigma_eps_b).exp()
    return image_bchw + sigma[:, None, None, None] * eps_bchw


def sample_posterior(mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """Draws an unscaled latent from the posterior, given unit normal noise; all of one shape."""
    return mean + (0.5 * logvar).exp() * eps


def image_condition(image_latent_btchw: Tensor, *, scale: float, num_latent_frames: int) -> Tensor:
    """Lays out an image's latent beside a clip's: in the first frame, with zeros after it.

    Args:
        image_latent_btchw: Unscaled latent of the image, one frame.
        scale: `image_latent_scale`. Diffusers multiplies with the autoencoder's factor for CogVideoX-5B-I2V
            and divides by it for 1.5-I2V; CogVideo trains both with the product, and samples without either.
        num_latent_frames: Latent frames of the clip, padding included.

    Returns:
        (b, t, c, h, w), the second half of the network's input channels.

    Source: diffusers 0.42 `CogVideoXImageToVideoPipeline.prepare_latents`.
    """
    b, _, c, h, w = image_latent_btchw.shape
    zeros = image_latent_btchw.new_zeros(b, num_latent_frames - 1, c, h, w)
    return torch.cat([scale * image_latent_btchw, zeros], dim=1)

"""The frozen models around the transformer: video autoencoder and text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sat_train.encoding.image_latent import noise_image
from sat_train.models.geometry import latent_frames

if TYPE_CHECKING:
    from sat_train.data.augmentation_key import AugmentationKey
    from sat_train.data.batch import VideoBatch
    from sat_train.models.text.t5 import T5TextEncoder
    from sat_train.models.vae.video_vae import VideoVAE

    LoadEncoders = Callable[[], tuple[VideoVAE, T5TextEncoder]]


def pixels_to_unit(pixels: Tensor, device: torch.device | str) -> Tensor:
    """Moves uint8 pixels to the device and to float32 in [-1, 1]."""
    assert pixels.dtype == torch.uint8, f"pixels are {pixels.dtype}, not uint8"
    return pixels.to(device).float() / 127.5 - 1.0


def unit_to_pixels(video: Tensor) -> Tensor:
    """Clamps [-1, 1] and rounds it to uint8 pixels."""
    return ((video.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def conditioning_image(
    batch: VideoBatch, augmentations: Sequence[AugmentationKey], device: torch.device | str
) -> Tensor:
    """Returns the first frames that condition a batch, float32 in [-1, 1], (b, c, h, w).

    Args:
        batch: With pixels; the clips' own first frames serve where it has no images.
        augmentations: Key of the noise on each sample's image, one a sample; empty for no noise.
        device: Where they go. The noise is drawn on the CPU.
    """
    pixels = batch.image_bchw
    if pixels is None:
        assert batch.video_btchw is not None, "a batch has pixels or encodings"
        pixels = batch.video_btchw[:, 0]
    image = pixels_to_unit(pixels, device)
    if not augmentations:
        return image
    eps = [torch.randn(image.shape[1:], generator=key.generator("image_noise")) for key in augmentations]
    log_sigma_eps = [torch.randn((), generator=key.generator("image_noise_level")) for key in augmentations]
    return noise_image(image, torch.stack(eps).to(device), torch.stack(log_sigma_eps).to(device))


class Encoders:
    """Video autoencoder and text encoder, used without gradients, on one sample at a time.

    Batched convolutions round differently: so a sample's encoding would depend on what is beside it.

    Args:
        vae: None when every batch comes from the cache and nothing is sampled.
        text_encoder: None when every batch comes from the cache and nothing is sampled.
        null_condition: What stands for a missing caption: zeros, or the encoded empty prompt.
        null_text_ld: The encoded empty prompt, where there is no text encoder to make it.
        dtype: Of the embeddings.
        device: Where the models are already.
        load: Loads both, where a run that reads encoded samples meets one that has to be encoded after all;
            None: that cannot happen.
    """

    def __init__(
        self,
        *,
        vae: VideoVAE | None,
        text_encoder: T5TextEncoder | None,
        null_condition: Literal["zero", "empty_prompt"],
        null_text_ld: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        load: LoadEncoders | None = None,
    ) -> None:
        self._vae, self._text_encoder, self._load = vae, text_encoder, load
        self._null_condition, self._null_text_ld = null_condition, null_text_ld
        self._dtype, self.device = dtype, device

    @property
    def vae(self) -> VideoVAE:
        """The video autoencoder."""
        vae = self._vae or self._load_both()[0]
        assert vae is not None, "no video autoencoder: this run reads encoded samples only"
        return vae

    def _load_both(self) -> tuple[VideoVAE | None, T5TextEncoder | None]:
        if self._load is not None:
            self._vae, self._text_encoder = self._load()
            self._load = None
        return self._vae, self._text_encoder

    @property
    def vae_dtype(self) -> torch.dtype:
        """What the autoencoder computes in; its moments are exact in it."""
        return next(self.vae.parameters()).dtype

    @torch.no_grad()
    def video_moments(self, video_btchw: Tensor, *, subject: str = "clip") -> tuple[Tensor, Tensor]:
        """Encodes clips.

        Args:
            video_btchw: uint8 pixels on any device.
            subject: Whose frames they are, for messages.

        Returns:
            Mean and log-variance of the posterior, unscaled, float32 (b, t, c, h, w).

        Raises:
            SatTrainError: The number of frames does not fit the autoencoder.
        """
        latent_frames(video_btchw.shape[1], compression=self.vae.temporal_compression, subject=subject)
        return self._moments([pixels_to_unit(clip, self.device) for clip in video_btchw.split(1)])

    @torch.no_grad()
    def image_moments(self, image_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes first frames.

        Args:
            image_bchw: float32 pixels in [-1, 1], on the device.

        Returns:
            Mean and log-variance of the posterior, unscaled, float32 (b, 1, c, h, w).
        """
        return self._moments([image[:, None] for image in image_bchw.split(1)])

    def _moments(self, clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        means, logvars = zip(*map(self.vae.encode_moments, clips), strict=True)
        return torch.cat(means), torch.cat(logvars)

    @torch.no_grad()
    def decode(self, latent_btchw: Tensor) -> Tensor:
        """Decodes unscaled latents to uint8 video_btchw on the CPU, one sample at a time."""
        videos = [unit_to_pixels(self.vae.decode(latent)).cpu() for latent in latent_btchw.split(1)]
        return torch.cat(videos)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """Encodes captions to (b, l, d)."""
        encoder = self._text_encoder or self._load_both()[1]
        assert encoder is not None, "no text encoder: this run reads encoded samples only"
        embeddings = [encoder.encode([caption]) for caption in captions]
        return torch.cat(embeddings).to(self.device, self._dtype)

    def null_text_like(self, text_bld: Tensor) -> Tensor:
        """Returns the embedding of no caption, of the shape of `text_bld`."""
        if self._null_condition == "zero":
            return torch.zeros_like(text_bld)
        return self._empty_prompt_ld.to(text_bld).expand_as(text_bld)

    @cached_property
    def _empty_prompt_ld(self) -> Tensor:
        return self.text([""])[0] if self._null_text_ld is None else self._null_text_ld

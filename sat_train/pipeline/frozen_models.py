"""The frozen models around the transformer: video autoencoder and text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from sat_train.pipeline.geometry import latent_frames

if TYPE_CHECKING:
    from sat_train.models.text.t5 import T5TextEncoder
    from sat_train.models.vae.video_vae import VideoVAE


def pixels_to_unit(pixels: Tensor, device: torch.device | str) -> Tensor:
    """Moves uint8 pixels to the device and to float32 in [-1, 1]."""
    assert pixels.dtype == torch.uint8, f"pixels are {pixels.dtype}, not uint8"
    return pixels.to(device).float() / 127.5 - 1.0


def unit_to_pixels(video: Tensor) -> Tensor:
    """Clamps [-1, 1] and rounds it to uint8 pixels."""
    return ((video.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


class FrozenModels:
    """Video autoencoder and text encoder, used without gradients.

    Args:
        vae: None when every batch comes from the cache and nothing is sampled.
        text_encoder: None when every batch comes from the cache and nothing is sampled.
        null_condition: What stands for a missing caption: zeros, or the encoded empty prompt.
        null_text_ld: The encoded empty prompt, where there is no text encoder to make it.
        dtype: Of the embeddings.
        device: Where the models are already.
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
    ) -> None:
        self._vae, self._text_encoder = vae, text_encoder
        self._null_condition, self._null_text_ld = null_condition, null_text_ld
        self._dtype, self._device = dtype, device

    @property
    def vae(self) -> VideoVAE:
        """The video autoencoder."""
        assert self._vae is not None, "no video autoencoder: this run reads encoded samples only"
        return self._vae

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
        return self.vae.encode_moments(pixels_to_unit(video_btchw, self._device))

    @torch.no_grad()
    def image_moments(self, image_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes first frames.

        Args:
            image_bchw: float32 pixels in [-1, 1], on the device.

        Returns:
            Mean and log-variance of the posterior, unscaled, float32 (b, 1, c, h, w).
        """
        return self.vae.encode_moments(image_bchw[:, None])

    @torch.no_grad()
    def decode(self, latent_btchw: Tensor) -> Tensor:
        """Decodes unscaled latents to uint8 video_btchw on the CPU, one sample at a time."""
        videos = [unit_to_pixels(self.vae.decode(latent)).cpu() for latent in latent_btchw.split(1)]
        return torch.cat(videos)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """Encodes captions to (b, l, d)."""
        assert self._text_encoder is not None, "no text encoder: this run reads encoded samples only"
        return self._text_encoder.encode(list(captions)).to(self._device, self._dtype)

    def null_text_like(self, text_bld: Tensor) -> Tensor:
        """Returns the embedding of no caption, of the shape of `text_bld`."""
        if self._null_condition == "zero":
            return torch.zeros_like(text_bld)
        return self._empty_prompt_ld.to(text_bld).expand_as(text_bld)

    @cached_property
    def _empty_prompt_ld(self) -> Tensor:
        return self.text([""])[0] if self._null_text_ld is None else self._null_text_ld

"""The frozen models around the transformer: video autoencoder and text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from sat_train.config import Geometry
from sat_train.distributed.processors import threads_of_a_rank
from sat_train.distributed.transfer import to_device
from sat_train.log import get_logger
from sat_train.models.half_on_cpu import half_products

if TYPE_CHECKING:
    from sat_train.models.text.t5 import T5TextEncoder
    from sat_train.models.vae.video_vae import VideoVAE

log = get_logger(__name__)

Model = TypeVar("Model")


_CAPTIONS_ON_GPU = 8  # enough rows to keep a GPU's matrix units busy; more would only take more memory


def captions_at_once(setting: int | Literal["auto"], *, on_gpu: bool) -> int:
    """Returns how many captions `texts` should be given, from `data.captions_at_once`.

    On a CPU one at a time, as a sample of a run without a cache is encoded: its losses stay the same, bit
    for bit.
    """
    if setting == "auto":
        return _CAPTIONS_ON_GPU if on_gpu else 1
    return setting


def pixels_to_unit(pixels: Tensor, device: torch.device | str) -> Tensor:
    """Moves uint8 pixels to the device and to float32 in [-1, 1]."""
    assert pixels.dtype == torch.uint8, f"pixels are {pixels.dtype}, not uint8"
    return to_device(pixels, torch.device(device)).float().div_(127.5).sub_(1.0)


def unit_to_pixels(video: Tensor) -> Tensor:
    """Clamps [-1, 1] and rounds it to uint8 pixels."""
    return ((video.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Encoders:
    """Video autoencoder and text encoder, used without gradients, on one sample at a time.

    Batched convolutions round differently, so a sample's encoding would depend on the rest of its batch.

    Args:
        load_vae: Loads the autoencoder.
        load_text_encoder: Loads the text encoder.
        geometry: Valid numbers of frames for the autoencoder.
        dtype: Dtype of the embeddings.
        device: Device of the autoencoder, and of all encodings.
        text_device: Device of the text encoder; None: the same.
        known_empty_prompt: Returns the embedding of the empty prompt, if it need not be encoded.
    """

    def __init__(
        self,
        *,
        load_vae: Callable[[], VideoVAE],
        load_text_encoder: Callable[[], T5TextEncoder],
        geometry: Geometry,
        dtype: torch.dtype,
        device: torch.device,
        text_device: torch.device | None = None,
        known_empty_prompt: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self._load_vae, self._load_text_encoder = load_vae, load_text_encoder
        self._vae: VideoVAE | None = None
        self._text_encoder: T5TextEncoder | None = None
        self._known_empty_prompt = known_empty_prompt
        self._kept_texts: dict[str, Tensor] = {}
        self._geometry, self._dtype = geometry, dtype
        self.device, self.text_device = device, text_device or device

    def load(self, *, vae: bool = True, text: bool = True) -> None:
        """Loads the models now; otherwise each is loaded, with a warning, when it is first needed."""
        if vae and self._vae is None:
            self._vae = self._load_vae()
        if text and self._text_encoder is None:
            self._text_encoder = self._load_text_encoder()

    @property
    def vae(self) -> VideoVAE:
        """The video autoencoder."""
        if self._vae is None:
            self._vae = _load_late(self._load_vae, "the VAE")
        return self._vae

    @property
    def text_encoder(self) -> T5TextEncoder:
        """The text encoder."""
        if self._text_encoder is None:
            self._text_encoder = _load_late(self._load_text_encoder, "T5")
        return self._text_encoder

    @torch.no_grad()
    def video(self, video_tchw: Tensor, *, subject: str) -> dict[str, Tensor]:
        """Encodes a clip.

        Args:
            video_tchw: uint8 pixels on any device.
            subject: Whose frames they are, for messages.

        Returns:
            As `frames`.

        Raises:
            SatTrainError: The number of frames does not fit the autoencoder.
        """
        self._geometry.check_frames(len(video_tchw), subject=subject)
        return self.frames(pixels_to_unit(video_tchw, self.device).to(self._vae_dtype))

    @torch.no_grad()
    def frames(self, frames_tchw: Tensor) -> dict[str, Tensor]:
        """Encodes frames.

        Args:
            frames_tchw: Pixels in [-1, 1], on the device, float32 or in the autoencoder's dtype.

        Returns:
            `mean` and `logvar` of the posterior, unscaled, (t, c, h, w), in the autoencoder's dtype.
        """
        with half_products(self.device, self._vae_dtype):
            mean, logvar = self.vae.encode_moments(frames_tchw[None])
        return {"mean": mean[0].to(self._vae_dtype), "logvar": logvar[0].to(self._vae_dtype)}

    @property
    def _vae_dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def decode_with_gradient(self, latent_btchw: Tensor) -> Tensor:
        """Decodes unscaled latents to pixels in [-1, 1], not clamped, float32, one sample at a time.

        The gradient reaches the latents; the decoder's activations are kept for it.
        """
        return torch.cat([self.vae.decode(latent).float() for latent in latent_btchw.split(1)])

    @torch.no_grad()
    def decode(self, latent_btchw: Tensor) -> Tensor:
        """Decodes unscaled latents to uint8 video_btchw on the CPU, one sample at a time."""
        vae = self.vae
        with half_products(self.device, self._vae_dtype):
            videos = (vae.decode(latent, vae.sample_tiling) for latent in latent_btchw.split(1))
            return torch.cat([unit_to_pixels(video).cpu() for video in videos])

    def text(self, caption: str) -> Tensor:
        """Encodes a caption to (l, d)."""
        if caption in self._kept_texts:
            return self._kept_texts[caption].to(self.device)
        return self.texts([caption])[0]

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Encodes captions to (b, l, d), together: a GPU may round them differently than one by one."""
        is_apart = self.text_device.type == "cpu" != self.device.type
        threads = threads_of_a_rank() if is_apart else nullcontext()
        with threads, half_products(self.text_device, self._dtype):
            text_bld = self.text_encoder.encode(captions)
        return to_device(text_bld, self.device).to(self._dtype)

    def keep_texts(self, captions: Iterable[str]) -> None:
        """Encodes captions, keeps their embeddings in host memory, and frees the text encoder.

        A caption that is not among them loads it again.
        """
        self._kept_texts.update({caption: self.text(caption).cpu() for caption in {*captions, ""}})
        self.free_text_encoder()

    def free_text_encoder(self) -> None:
        """Frees the text encoder; a text that is not kept loads it again."""
        self._text_encoder = None

    def empty_prompt(self) -> Tensor:
        """Returns the embedding of the empty prompt, (l, d)."""
        return self._empty_prompt_ld

    @cached_property
    def _empty_prompt_ld(self) -> Tensor:
        known = self._known_empty_prompt()
        return self.text("") if known is None else known.to(self.device)


def _load_late(load: Callable[[], Model], name: str) -> Model:
    """Loads a model in the middle of a run, without changing the run's random numbers."""
    log.warning("a sample is not in the cache after all: loading %s", name)
    with torch.random.fork_rng():
        return load()

"""Known frames of the video in the image latent: image to video, interpolation, continuation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.encoding.conditions.condition import Condition, DitInputs, Encoding
from sat_train.encoding.conditions.image import noise_image
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.errors import SatTrainError
from sat_train.models.encoders import Encoders, pixels_to_unit

_CLIPS = ("prefix", "all")  # encoded as a video; all others are pictures by themselves


class FramesInSlot(Condition):
    """Latents of known frames, each at its own latent frame; the rest of the image latent is zero.

    A picture stands where its latent frame ends: that of latent frame j > 0 is pixel frame
    `temporal_compression * j`. With padding in front (1.5) the first picture stands in the very first frame,
    as in CogVideoX1.5-I2V, and a prefix is padded as the clip is. `first` equals `ImageCondition`.

    Source: diffusers 0.42 `CogVideoXImageToVideoPipeline.prepare_latents` for `first`.
    """

    tensors = frozenset({"mean", "logvar", "index"})
    drop_purpose = "image_drop"
    reads_caption = False

    def __init__(self, params: Any = None, model: Any = None) -> None:
        super().__init__(params, model)
        self.augments = params.which == "random" or params.noise_log_mean is not None
        self._has_slot = "image" in model.conditions

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Returns the moments of the known frames, (k, c, h, w), and their frames in the padded latent."""
        shape = self.latent_shape(sample)
        if self.params.which in _CLIPS:
            count = min(self.params.count, shape.frames) if self.params.which == "prefix" else shape.frames
            pixel_frames = (count - 1) * self.model.temporal_compression + 1
            pixels = self._video(sample, pixel_frames)[:pixel_frames]
            moments = encoders.frames(self._noised(pixels, sample, encoders.device))
            return {**moments, "index": torch.arange(count) + shape.padding}
        frames = self._chosen(sample, shape.frames)
        images = self._noised(self._pictures(sample, frames), sample, encoders.device)
        each = [encoders.frames(image[None]) for image in images]
        moments = {name: torch.cat([moment[name] for moment in each]) for name in each[0]}
        return {**moments, "index": torch.tensor([i + shape.padding * (i > 0) for i in frames])}

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Returns the scaled latents at their frames: as the image latent, or as channels of their own."""
        latent = self.model.image_latent_scale * random.latent(encoded, "image_posterior")
        index = encoded["index"].long()
        slot = latent.new_zeros(tuple(latent_shape))
        slot.scatter_(1, index[:, :, None, None, None].expand_as(latent), latent)
        if self.params.which in _CLIPS:  # the padding in front repeats the first frame
            is_padding_bt = torch.arange(slot.shape[1], device=index.device) < index[:, :1]
            slot = torch.where(is_padding_bt[:, :, None, None, None], latent[:, :1], slot)
        return DitInputs(image_latent_btchw=slot) if self._has_slot else DitInputs(channels_btchw=slot)

    def drop(self, encoded: Encoding, dropped_b: Tensor) -> Encoding:
        """Replaces posteriors by one whose samples are exactly zero; frames keep their places."""
        return {**super().drop(encoded, dropped_b), "index": encoded["index"]}

    def _chosen(self, sample: VideoSample, frames: int) -> list[int]:
        """Returns the latent frames of the pictures, ascending."""
        which, last = self.params.which, frames - 1
        if which != "random":
            return sorted({0} if which == "first" else {last} if which == "last" else {0, last})
        count = min(self.params.count, frames)
        if not sample.training:
            return [int(each) for each in torch.linspace(0, last, count).round()]
        chosen = torch.randperm(frames, generator=sample.generator("known_frames"))[:count]
        return sorted(chosen.tolist())

    def _pictures(self, sample: VideoSample, frames: Sequence[int]) -> Tensor:
        """Returns pixels of the pictures at these latent frames, uint8 `[k, 3, h, w]`.

        A prompt may come with the pictures alone, of which the last one is the last.
        """
        which = self.params.which
        if which == "first" and self.params.field is None and sample.image_chw is not None:
            return sample.image_chw[None]
        wanted = [self.model.temporal_compression * frame for frame in frames]
        if which in ("last", "first_last"):
            wanted[-1] = -1
        return self._video(sample, max(len(wanted), *(frame + 1 for frame in wanted)))[wanted]

    def _video(self, sample: VideoSample, least: int) -> Tensor:
        """Returns the video that the frames are from, uint8 `[t, 3, h, w]`."""
        field = self.params.field
        video = sample.video_tchw if field is None else sample.fields[field]
        if len(video) < least:
            raise SatTrainError(
                f"condition '{self.name}': {len(video)} frames of {field or 'the video'} are given",
                expected=f"{least} or more, for which: {self.params.which}",
                remedy="give them with the prompt: an image, or the field that `params.field` names",
            )
        return video

    def _noised(self, pixels: Tensor, sample: VideoSample, device: torch.device) -> Tensor:
        """Returns pixels in [-1, 1], noised in training; the numbers are drawn on the CPU."""
        params, video = self.params, pixels_to_unit(pixels, device)
        if params.noise_log_mean is None or not sample.training:
            return video
        eps = torch.randn(video.shape, generator=sample.generator("image_noise"))
        normal = torch.randn((), generator=sample.generator("image_noise_level"))
        log_sigma = params.noise_log_mean + params.noise_log_std * normal
        return noise_image(video, eps.to(device), log_sigma.to(device))

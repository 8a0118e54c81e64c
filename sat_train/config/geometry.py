"""Geometry of a model: pixels to latents, and latents to patches. The only place of this arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from sat_train.errors import SatTrainError


@dataclass(frozen=True)
class LatentShape:
    """Shape of a clip's latent.

    Args:
        frames: Latent frames that show the clip.
        height: In latent elements.
        width: In latent elements.
        padding: Frames prepended to them, so that the length divides into patches.
    """

    frames: int
    height: int
    width: int
    padding: int

    @property
    def padded_frames(self) -> int:
        """Latent frames that the transformer sees, padding included."""
        return self.padding + self.frames


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of patches and of latent elements, with the arithmetic that follows from them.

    Args:
        patch: Frames, height and width of a patch in latent elements: (1, 2, 2) is 1.0, (2, 2, 2) is 1.5.
        temporal_compression: Pixel frames in one latent frame after the first.
        spatial_compression: Pixels along one side of a latent element.
    """

    patch: tuple[int, int, int]
    temporal_compression: int
    spatial_compression: int

    @property
    def size_multiples(self) -> tuple[int, int]:
        """Numbers of pixels that height and width must be multiples of."""
        return self.spatial_compression * self.patch[1], self.spatial_compression * self.patch[2]

    @property
    def frame_step(self) -> int:
        """Pixel frames between two lengths that need the same padding."""
        return self.temporal_compression * self.patch[0]

    def latent_frames(self, frames: int) -> int:
        """Returns the latent frames of so many pixel frames, which `has_whole_latents`."""
        return (frames - 1) // self.temporal_compression + 1

    def has_whole_latents(self, frames: int) -> bool:
        """Returns whether a number of pixel frames is a multiple of the compression, plus 1."""
        return frames >= 1 and (frames - 1) % self.temporal_compression == 0

    def nearest_frames(self, frames: int) -> tuple[int, int]:
        """Returns the largest valid number of pixel frames up to one that is not valid, and the next."""
        below = max((frames - 1) // self.temporal_compression, 0) * self.temporal_compression + 1
        return below, below + self.temporal_compression

    def padding(self, latent_frames: int) -> int:
        """Returns the number of latent frames to add until the length divides into patches."""
        return -latent_frames % self.patch[0]

    def latent(self, frames: int, height: int, width: int) -> LatentShape:
        """Returns the shape of the latent of a clip, given in pixels."""
        latent_frames, side = self.latent_frames(frames), self.spatial_compression
        return LatentShape(latent_frames, height // side, width // side, self.padding(latent_frames))

    def patches(self, latent: LatentShape) -> int:
        """Returns the video tokens of a latent."""
        patch_t, patch_h, patch_w = self.patch
        return latent.padded_frames // patch_t * (latent.height // patch_h) * (latent.width // patch_w)

    def pixel_frames(self, latent_frames: int) -> int:
        """Returns the pixel frames of a sample of so many latent frames, counted as CogVideo's
        `sampling_num_frames` counts.

        There the count of a model with patches in time includes the padding: 22 latent frames of CogVideoX
        1.5 are 81 frames.

        Source: zai-org/CogVideo@7a1af71 `sat/configs/inference.yaml`, `sat/diffusion_video.py`
            decode_first_stage.
        """
        has_padding = self.patch[0] > 1 and latent_frames > 1 and self.padding(latent_frames) == 0
        return (latent_frames - has_padding - 1) * self.temporal_compression + 1

    def check_frames(self, frames: int, *, subject: str) -> None:
        """Raises SatTrainError where a number of pixel frames does not fit the autoencoder.

        Args:
            frames: Pixel frames.
            subject: Whose frames they are, for the message.
        """
        if not self.has_whole_latents(frames):
            below, above = self.nearest_frames(frames)
            raise SatTrainError(
                f"{subject}: {frames} frames do not fit the video autoencoder",
                expected=f"{self.temporal_compression} k + 1 frames",
                remedy=f"the nearest counts are {below} and {above}",
            )

    def check_size(self, height: int, width: int, *, subject: str) -> None:
        """Raises SatTrainError where a height or width in pixels does not divide into patches."""
        by_height, by_width = self.size_multiples
        if height % by_height or width % by_width or min(height, width) < 1:
            raise SatTrainError(
                f"{subject}: {height}x{width} pixels do not divide into patches",
                expected=f"a height that is a multiple of {by_height} and a width that is one of {by_width}",
                remedy="change the size, or crop",
            )

"""The video VAE of the project: pixels to moments, latents to pixels, in btchw.

What "chunked" means here. Convolutions, up- and downsampling give the same values however a clip is cut,
thanks to the causal state. The group norms do not: their statistics are over the frames of a chunk. So the
cut is part of what the encoder and decoder compute, and it is fixed by `chunk_lengths`, not by how much
memory there is. Two definitions are in use for the same weights:

* diffusers encodes 8 frames and decodes 2 latent frames at a time, the remainder joining the first chunk. It
  is the default here.
* SAT decodes like that (up to 21 latent frames; beyond, its chunks grow), but encodes the clip as a whole:
  `encode_chunk_frames=None`.

Tests hold this: a clip that ends at a chunk border has the same latents as the start of a longer one; with
the statistics of the group norms held fixed, any cut equals no cut.

An even number of latent frames (5, 13, ... pixel frames) decodes to 4 (t - 1) + 1 frames, as in SAT.
diffusers takes the chunk's even length for "not the start of a clip" and returns 4 t.

Source: THUDM/CogVideo@7a1af71 `sat/diffusion_video.py` decode_first_stage, encode_first_stage; diffusers
0.42 `autoencoder_kl_cogvideox.py` AutoencoderKLCogVideoX; posterior clamp `sat/vae_modules/regularizers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sat_train.models.vae.causal import ClipState
from sat_train.models.vae.coder import Decoder3D, Encoder3D
from sat_train.models.vae.tiling import Tiling, code_in_tiles

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


def chunk_lengths(num_frames: int, frames_per_chunk: int | None) -> list[int]:
    """Splits a clip into chunks of `frames_per_chunk`; the first one also takes the remainder.

    Args:
        num_frames: Of the clip, >= 1.
        frames_per_chunk: None leaves the clip whole.

    Returns:
        Lengths in order; 49 by 8 gives [9, 8, 8, 8, 8, 8], 13 by 8 gives [13], 4 by 8 gives [4].
    """
    if frames_per_chunk is None:
        return [num_frames]
    count = max(num_frames // frames_per_chunk, 1)
    return [num_frames - frames_per_chunk * (count - 1)] + [frames_per_chunk] * (count - 1)


class VideoVAE(nn.Module):
    """3D causal VAE of CogVideoX, with the released model's settings as defaults.

    Runs in the dtype of its parameters and records gradients only if they do (`build_vae` gives it frozen).

    Args:
        ch: Base width.
        ch_mult: Width of each level as a multiple of `ch`; n levels compress height and width by 2^(n-1).
        num_res_blocks: Residual blocks a level in the encoder; the decoder has one more.
        z_channels: Latent channels.
        in_channels: Pixel channels in.
        out_ch: Pixel channels out.
        temporal_compress_times: Pixel frames a latent frame after the first; a power of two.
        norm_num_groups: Of every group norm.
        encode_chunk_frames: Pixel frames encoded at a time, a multiple of `temporal_compress_times`; None:
            the whole clip.
        decode_chunk_frames: Latent frames decoded at a time; None: the whole clip.
        clips_at_once: Clips of a batch coded together; None: all. Changes memory, no value.
        tiling: Tiles for pictures larger than one; None: never tile.
        sample_tiling: Tiles of samples, which callers hand to `decode`; None: `tiling`.
    """

    def __init__(
        self,
        *,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 3,
        z_channels: int = 16,
        in_channels: int = 3,
        out_ch: int = 3,
        temporal_compress_times: int = 4,
        norm_num_groups: int = 32,
        encode_chunk_frames: int | None = 8,
        decode_chunk_frames: int | None = 2,
        clips_at_once: int | None = None,
        tiling: Tiling | None = None,
        sample_tiling: Tiling | None = None,
    ) -> None:
        super().__init__()
        num_time_levels = temporal_compress_times.bit_length() - 1
        assert 2**num_time_levels == temporal_compress_times, (
            f"temporal_compress_times {temporal_compress_times} is no power of two"
        )
        assert encode_chunk_frames is None or encode_chunk_frames % temporal_compress_times == 0, (
            f"encode_chunk_frames {encode_chunk_frames} is no multiple of {temporal_compress_times}"
        )
        self.spatial_compression = 2 ** (len(ch_mult) - 1)
        self.temporal_compression = temporal_compress_times
        self.z_channels = z_channels
        self.encode_chunk_frames = encode_chunk_frames
        self.decode_chunk_frames = decode_chunk_frames
        self.clips_at_once = clips_at_once
        self.tiling, self.sample_tiling = tiling, sample_tiling
        self.encoder = Encoder3D(
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            z_channels=z_channels,
            in_channels=in_channels,
            num_time_levels=num_time_levels,
            num_groups=norm_num_groups,
        )
        self.decoder = Decoder3D(
            ch=ch,
            ch_mult=ch_mult,
            num_res_blocks=num_res_blocks,
            z_channels=z_channels,
            out_ch=out_ch,
            num_time_levels=num_time_levels,
            num_groups=norm_num_groups,
        )

    def encode_moments(self, video_btchw: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes clips to the mean and log-variance of their posterior.

        Args:
            video_btchw: (b, t, c, h, w) in [-1, 1], any float dtype; t = 4 k + 1 (with x4 in time), h and w
                of any size, at least one latent pixel.

        Returns:
            mean_btchw and logvar_btchw, (b, k + 1, z, h // 8, w // 8), fp32; the log-variance within [-30,
            20]. Unscaled.
        """
        t, h, w = (video_btchw.shape[dim] for dim in (1, 3, 4))
        assert (t - 1) % self.temporal_compression == 0, (
            f"{t} frames: the VAE takes {self.temporal_compression} k + 1"
        )
        assert min(h, w) >= self.spatial_compression, f"{h}x{w} pixels are less than one latent pixel"
        moments = self._code(video_btchw, self._encode_clips)
        mean_btchw, logvar_btchw = moments.float().chunk(2, dim=2)
        return mean_btchw.contiguous(), logvar_btchw.clamp(LOGVAR_MIN, LOGVAR_MAX)

    def decode(self, latent_btchw: Tensor, tiling: Tiling | None = None) -> Tensor:
        """Decodes latents to pixels.

        Args:
            latent_btchw: (b, t, z, h, w), any float dtype, unscaled.
            tiling: Tiles where the autoencoder's own setting is to have none.

        Returns:
            video_btchw (b, 4 (t - 1) + 1, c, 8 h, 8 w), about [-1, 1] but not clamped, in the dtype of the
            parameters.
        """
        return self._code(latent_btchw, partial(self._decode_clips, tiling=self.tiling or tiling))

    def _code(self, x_btchw: Tensor, code: Callable[[Tensor], Tensor]) -> Tensor:
        x = x_btchw.to(next(self.parameters()).dtype).transpose(1, 2)
        clips = x.split(self.clips_at_once or len(x))
        return torch.cat([code(clip) for clip in clips]).transpose(1, 2).contiguous()

    def _encode_clips(self, x: Tensor) -> Tensor:
        return self._code_in_space(x, self._encode_in_time, self.spatial_compression, 1, self.tiling)

    def _decode_clips(self, z: Tensor, *, tiling: Tiling | None) -> Tensor:
        return self._code_in_space(z, self._decode_in_time, 1, self.spatial_compression, tiling)

    def _encode_in_time(self, x: Tensor) -> Tensor:
        return _code_in_chunks(x, self.encoder, chunk_lengths(x.shape[2], self.encode_chunk_frames))

    def _decode_in_time(self, z: Tensor) -> Tensor:
        return _code_in_chunks(z, self.decoder, chunk_lengths(z.shape[2], self.decode_chunk_frames))

    def _code_in_space(
        self,
        x: Tensor,
        code: Callable[[Tensor], Tensor],
        pixels_in: int,
        pixels_out: int,
        tiling: Tiling | None,
    ) -> Tensor:
        """Codes x, in tiles if it is larger than one; a latent pixel is `pixels_in` wide in x, and
        `pixels_out` wide after.
        """
        side = self.spatial_compression
        latent_size = (x.shape[3] // pixels_in, x.shape[4] // pixels_in)
        if tiling is None or not tiling.is_needed(latent_size[0] * side, latent_size[1] * side):
            return code(x)
        tile = (tiling.height // side, tiling.width // side)
        overlap = (tiling.overlap_height // side, tiling.overlap_width // side)
        return code_in_tiles(
            x,
            code,
            tile_in=_times(tile, pixels_in),
            overlap_in=_times(overlap, pixels_in),
            tile_out=_times(tile, pixels_out),
            overlap_out=_times(overlap, pixels_out),
            grid=tuple(-(-size // (t - o)) for size, t, o in zip(latent_size, tile, overlap, strict=True)),
        )


def _times(pair: tuple[int, int], factor: int) -> tuple[int, int]:
    return pair[0] * factor, pair[1] * factor


def _code_in_chunks(x: Tensor, coder: nn.Module, lengths: list[int]) -> Tensor:
    state = ClipState()
    coded = []
    for chunk in x.split(lengths, dim=2):
        coded.append(coder(chunk, state))
        state.at_start = False
    return torch.cat(coded, dim=2)

"""Layers of the 3D causal VAE: no frame depends on a later one, so a clip can be processed in chunks.

Inside the VAE the layout is bcthw. A clip goes through a coder as one or several chunks, in order. What a
chunk needs from the ones before it travels in a `ClipState` that belongs to that one pass: the modules hold
nothing between calls, so a pass that fails half-way leaves nothing behind, and two clips never mix.

Time is special at the first frame only: it stands alone, and every later group of
`temporal_compress_times` frames shares one latent frame.

Source: THUDM/CogVideo@7a1af71 `sat/vae_modules/cp_enc_dec.py` (names of the parameters, arithmetic);
diffusers 0.42 `autoencoder_kl_cogvideox.py`. Differences that change no value: the caches stay on the
device, and the 1x1x1 convolutions of `SpatialNorm3D` run on the small latent before it is spread, not after.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


@dataclass
class ClipState:
    """State that one pass over a clip carries from chunk to chunk.

    Args:
        at_start: The chunk about to be taken holds the clip's first frame.
        tails: Last input frames of each causal convolution, bcthw, on the device of the input. They are
            copies, so that a chunk's activations are freed with it; gradients flow through them.
    """

    at_start: bool = True
    tails: dict[nn.Module, Tensor] = field(default_factory=dict)


def _conv3d(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """Applies a stride-1 3D convolution without padding in time; on a CPU as a 2D convolution over stacked
    frames.

    oneDNN's 3D kernels are five to eight times slower than its 2D ones at the widths a CPU can train.
    """
    if x.device.type != "cpu":
        y: Tensor = conv(x)
        return y
    windows = x.unfold(2, conv.kernel_size[0], 1).permute(0, 2, 1, 5, 3, 4)  # b t c k h w
    frames: Tensor = F.conv2d(
        windows.flatten(2, 3).flatten(0, 1), conv.weight.flatten(1, 2), conv.bias, padding=conv.padding[1:]
    )
    frames = frames.unflatten(0, windows.shape[:2])
    return frames.transpose(1, 2)


class CausalConv3d(nn.Module):
    """3D convolution, padded in time with the previous frames, or with copies of the first frame.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel_size: Odd; the same in time, height and width. 1 makes it pointwise.
    """

    # cuDNN indexes with 32 bits: larger inputs are convolved in pieces of time, which gives the same values.
    max_elements = 2**31 - 1

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        pad = kernel_size // 2
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, padding=(0, pad, pad))
        self.num_frames_before = kernel_size - 1

    def forward(self, x: Tensor, state: ClipState) -> Tensor:
        """Convolves one chunk and leaves its last frames in `state`.

        Args:
            x: (b, c, t, h, w), t >= 1.
            state: Of this clip.

        Returns:
            (b, c, t, h, w).
        """
        before = self.num_frames_before
        if before == 0:
            return _conv3d(self.conv, x)
        tail = x[:, :, :1].expand(-1, -1, before, -1, -1) if state.at_start else state.tails.pop(self)
        x = torch.cat([tail, x], dim=2)
        state.tails[self] = x[:, :, -before:].clone()
        return self._conv_in_pieces(x)

    def _conv_in_pieces(self, x: Tensor) -> Tensor:
        before = self.num_frames_before
        frames_out = x.shape[2] - before
        piece = max(1, self.max_elements // (x.numel() // x.shape[2]) - before)
        if piece >= frames_out:
            return _conv3d(self.conv, x)
        starts = range(0, frames_out, piece)
        return torch.cat(
            [_conv3d(self.conv, x[:, :, start : start + piece + before]) for start in starts], dim=2
        )


def spread_nearest(x: Tensor, factor_t: int, factor_h: int, factor_w: int) -> Tensor:
    """Repeats each voxel: nearest-neighbour enlargement by integer factors.

    Args:
        x: (b, c, t, h, w).
        factor_t: Copies in time.
        factor_h: Copies in height.
        factor_w: Copies in width.

    Returns:
        (b, c, t * factor_t, h * factor_h, w * factor_w).
    """
    b, c, t, h, w = x.shape
    copies = x[:, :, :, None, :, None, :, None].expand(-1, -1, -1, factor_t, -1, factor_h, -1, factor_w)
    return copies.reshape(b, c, t * factor_t, h * factor_h, w * factor_w)


class SpatialNorm3D(nn.Module):
    """Group norm whose scale and shift come from the latent: `norm(f) * y(z) + b(z)`, with y and b
    pointwise.

    The statistics are over all frames of the chunk. This is the one thing in the VAE that depends on where a
    clip is cut.

    Args:
        num_channels: Of the features.
        z_channels: Of the latent.
        num_groups: Of the group norm.
    """

    def __init__(self, num_channels: int, z_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(num_groups, num_channels, eps=NORM_EPS)
        self.conv_y = CausalConv3d(z_channels, num_channels, kernel_size=1)
        self.conv_b = CausalConv3d(z_channels, num_channels, kernel_size=1)

    def forward(self, f: Tensor, z: Tensor, state: ClipState) -> Tensor:
        """Normalises features.

        Args:
            f: (b, c, t * k, h * s, w * s), or one frame and then t - 1 groups of k when the chunk starts the
                clip.
            z: (b, z, t, h, w), the latent that is being decoded.
            state: Of this clip.

        Returns:
            Like f.
        """
        y, b = (self._spread_over(conv(z, state), f, state) for conv in (self.conv_y, self.conv_b))
        return torch.addcmul(b, self.norm_layer(f), y)

    def _spread_over(self, z: Tensor, f: Tensor, state: ClipState) -> Tensor:
        scale = f.shape[-1] // z.shape[-1]
        if not state.at_start or f.shape[2] == z.shape[2]:
            return spread_nearest(z, f.shape[2] // z.shape[2], scale, scale)
        first = spread_nearest(z[:, :, :1], 1, scale, scale)
        rest = spread_nearest(z[:, :, 1:], (f.shape[2] - 1) // (z.shape[2] - 1), scale, scale)
        return torch.cat([first, rest], dim=2)


def _norm(num_channels: int, num_groups: int, z_channels: int | None) -> nn.Module:
    if z_channels is None:
        return nn.GroupNorm(num_groups, num_channels, eps=NORM_EPS)
    return SpatialNorm3D(num_channels, z_channels, num_groups)


class ResnetBlock3D(nn.Module):
    """Twice norm, SiLU and causal convolution, added to the input (with a pointwise convolution if the width
    changes).

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        num_groups: Of the group norms.
        z_channels: Width of the latent that conditions the norms (decoder); None: plain group norm
            (encoder).
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, num_groups: int, z_channels: int | None = None
    ) -> None:
        super().__init__()
        self.is_conditioned = z_channels is not None
        self.norm1 = _norm(in_channels, num_groups, z_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = _norm(out_channels, num_groups, z_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.nin_shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, state: ClipState, z: Tensor | None = None) -> Tensor:
        """Maps (b, in, t, h, w) to (b, out, t, h, w); `z` as in `SpatialNorm3D`."""
        condition = (z, state) if self.is_conditioned else ()
        h: Tensor = self.conv1(F.silu(self.norm1(x, *condition)), state)
        h = self.conv2(F.silu(self.norm2(h, *condition)), state)
        return h + (x if self.nin_shortcut is None else _conv3d(self.nin_shortcut, x))


def _conv_each_frame(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Applies a 2D convolution to every frame of (b, c, t, h, w)."""
    frames: Tensor = conv(x.transpose(1, 2).flatten(0, 1))
    frames = frames.unflatten(0, (x.shape[0], x.shape[2]))
    return frames.transpose(1, 2)


class Downsample3D(nn.Module):
    """Halves height and width (floor), and also time with `compress_time`; the first frame is kept.

    Args:
        channels: Channels in and out.
        compress_time: Average each pair of frames.
    """

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.compress_time = compress_time

    def forward(self, x: Tensor, state: ClipState) -> Tensor:
        """Maps (b, c, t, h, w) to (b, c, t', h // 2, w // 2); t' = (t + 1) / 2 at the start, else t / 2."""
        if self.compress_time:
            alone = 1 if state.at_start else 0
            pairs = x[:, :, alone:].unflatten(2, (-1, 2))
            x = torch.cat([x[:, :, :alone], pairs.mean(dim=3)], dim=2)
        return _conv_each_frame(self.conv, F.pad(x, (0, 1, 0, 1)))


class Upsample3D(nn.Module):
    """Doubles height and width, and also time with `compress_time`; the clip's first frame is not doubled.

    Args:
        channels: Channels in and out.
        compress_time: Repeat each frame.
    """

    def __init__(self, channels: int, *, compress_time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.compress_time = compress_time

    def forward(self, x: Tensor, state: ClipState) -> Tensor:
        """Maps (b, c, t, h, w) to (b, c, t', 2 h, 2 w); t' = 2 t - 1 at the start, else 2 t."""
        x = spread_nearest(x, 2 if self.compress_time else 1, 2, 2)
        if self.compress_time and state.at_start:
            x = x[:, :, 1:]
        return _conv_each_frame(self.conv, x)

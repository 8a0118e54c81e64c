"""Encoder and decoder of the 3D causal VAE, with the parameter names of SAT's `3d-vae.pt`.

Source: THUDM/CogVideo@7a1af71 `sat/vae_modules/cp_enc_dec.py` ContextParallelEncoder3D,
ContextParallelDecoder3D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sat_train.models.vae.causal import (
    NORM_EPS,
    CausalConv3d,
    ClipState,
    Downsample3D,
    ResnetBlock3D,
    SpatialNorm3D,
    Upsample3D,
)


class Level(nn.Module):
    """Blocks at one resolution, and the layer that leaves it, except in the last level.

    Args:
        block: Residual blocks in order.
        downsample: Leaves the level for the next smaller one.
        upsample: Leaves the level for the next larger one.
    """

    def __init__(
        self,
        block: Sequence[ResnetBlock3D],
        *,
        downsample: Downsample3D | None = None,
        upsample: Upsample3D | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(block)
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, h: Tensor, state: ClipState, z: Tensor | None = None) -> Tensor:
        """Maps (b, c, t, h, w) through the blocks, then out of the level; `z` as in `SpatialNorm3D`."""
        for block in self.block:
            h = block(h, state, z)
        leave = self.downsample or self.upsample
        return h if leave is None else leave(h, state)


class Middle(nn.Module):
    """Two residual blocks at the smallest resolution."""

    def __init__(self, width: int, *, num_groups: int, z_channels: int | None = None) -> None:
        super().__init__()
        self.block_1 = ResnetBlock3D(width, width, num_groups=num_groups, z_channels=z_channels)
        self.block_2 = ResnetBlock3D(width, width, num_groups=num_groups, z_channels=z_channels)

    def forward(self, x: Tensor, state: ClipState, z: Tensor | None = None) -> Tensor:
        """Maps (b, width, t, h, w) to the same shape."""
        h: Tensor = self.block_2(self.block_1(x, state, z), state, z)
        return h


class Encoder3D(nn.Module):
    """Encodes frames to posterior moments.

    Args:
        ch: Base width.
        ch_mult: Width of each level as a multiple of `ch`; each level but the last halves height and width.
        num_res_blocks: Residual blocks a level.
        z_channels: Channels of the latent.
        in_channels: Channels of the frames.
        num_time_levels: How many of the first levels halve time.
        num_groups: Of the group norms.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        in_channels: int,
        num_time_levels: int,
        num_groups: int,
    ) -> None:
        super().__init__()
        self.conv_in = CausalConv3d(in_channels, ch)
        self.down = nn.ModuleList()
        width = ch
        for level, multiple in enumerate(ch_mult):
            blocks = []
            for _ in range(num_res_blocks):
                blocks.append(ResnetBlock3D(width, ch * multiple, num_groups=num_groups))
                width = ch * multiple
            is_last = level == len(ch_mult) - 1
            downsample = None if is_last else Downsample3D(width, compress_time=level < num_time_levels)
            self.down.append(Level(blocks, downsample=downsample))
        self.mid = Middle(width, num_groups=num_groups)
        self.norm_out = nn.GroupNorm(num_groups, width, eps=NORM_EPS)
        self.conv_out = CausalConv3d(width, 2 * z_channels)

    def forward(self, x: Tensor, state: ClipState) -> Tensor:
        """Encodes one chunk: (b, c, t, h, w) to (b, 2 z, t', h', w'), mean then log-variance along dim 1."""
        h = self.conv_in(x, state)
        for level in self.down:
            h = level(h, state)
        h = self.mid(h, state)
        moments: Tensor = self.conv_out(F.silu(self.norm_out(h)), state)
        return moments


class Decoder3D(nn.Module):
    """Decodes latents to frames; every norm is conditioned on the latent.

    `up[i]` is the level of `ch_mult[i]`, so decoding runs through `up` from its end to its start.

    Args:
        ch: Base width.
        ch_mult: As in `Encoder3D`.
        num_res_blocks: One fewer than the residual blocks a level.
        z_channels: Channels of the latent.
        out_ch: Channels of the frames.
        num_time_levels: How many of the smallest levels double time.
        num_groups: Of the group norms.
    """

    def __init__(
        self,
        *,
        ch: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        z_channels: int,
        out_ch: int,
        num_time_levels: int,
        num_groups: int,
    ) -> None:
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = CausalConv3d(z_channels, width)
        self.mid = Middle(width, num_groups=num_groups, z_channels=z_channels)
        levels = []
        for level in reversed(range(len(ch_mult))):
            blocks = []
            for _ in range(num_res_blocks + 1):
                wide = ch * ch_mult[level]
                blocks.append(ResnetBlock3D(width, wide, num_groups=num_groups, z_channels=z_channels))
                width = wide
            compress_time = level >= len(ch_mult) - num_time_levels
            upsample = Upsample3D(width, compress_time=compress_time) if level else None
            levels.append(Level(blocks, upsample=upsample))
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = SpatialNorm3D(width, z_channels, num_groups)
        self.conv_out = CausalConv3d(width, out_ch)

    def forward(self, z: Tensor, state: ClipState) -> Tensor:
        """Decodes one chunk: (b, z, t, h, w) to (b, c, t', h', w')."""
        h = self.mid(self.conv_in(z, state), state, z)
        for level in reversed(self.up):
            h = level(h, state, z)
        frames: Tensor = self.conv_out(F.silu(self.norm_out(h, z, state)), state)
        return frames

"""Fixed sine-cosine tables of positions (2B)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_train.config import NetworkSpec
from sat_train.config.parts.position_parts import Sincos3DPositionEmbeddingParams
from sat_train.models.dit.embedding import PatchGrid
from sat_train.models.dit.positions import Device, PositionEmbedding, Times, check_size, is_prefix


class SincosPositions(PositionEmbedding):
    """Adds a fixed sine-cosine table (CogVideoX-2B). It is a buffer: saved with the weights, never trained.

    Args:
        params: Its settings; at sizes other than that of pre-training the formula gives the table, as in
            diffusers, or they are refused.
        spec: The transformer.
    """

    def __init__(self, params: Sincos3DPositionEmbeddingParams, spec: NetworkSpec) -> None:
        super().__init__()
        self.text_length, self.size_policy = params.text_length, params.size_policy
        self.base, self.interpolation = PatchGrid(*spec.trained_patches), spec.interpolation
        device = torch.get_default_device()
        table = sincos_table(self.base, spec.width, interpolation=self.interpolation, device=device)
        table = F.pad(table, (0, 0, params.text_length, 0))[None]
        self.register_buffer("pos_embedding", table.to(torch.get_default_dtype()))

    def position_embedding_forward(self, grid: PatchGrid, text_length: int) -> Tensor:
        """SAT hook: positions that are added to the tokens, `[1, text_length + grid.tokens, d]`."""
        table = self.pos_embedding[0, self.text_length :]
        if is_prefix(self.base, grid):
            video = table[: grid.tokens]
        else:
            check_size(self.base, grid, size_policy=self.size_policy)
            video = sincos_table(
                grid, table.shape[-1], interpolation=self.interpolation, device=table.device
            ).to(table.dtype)
        return F.pad(video, (0, 0, text_length, 0))[None]

    def frame_positions(self, grid: PatchGrid, times: Times) -> Tensor:
        """Returns the positions of appended frames, by the formula at any time."""
        if not is_prefix(self.base, grid):
            check_size(self.base, grid, size_policy=self.size_policy)
        table = self.pos_embedding
        frames = sincos_table(
            grid, table.shape[-1], interpolation=self.interpolation, times=times, device=table.device
        )
        return frames.to(table.dtype)[None]


def sincos_table(
    grid: PatchGrid,
    dim: int,
    *,
    interpolation: tuple[float, float, float] = (1.0, 1.0, 1.0),
    times: Times | None = None,
    device: Device = "cpu",
) -> Tensor:
    """Returns the sine-cosine embedding of every patch: a quarter of the width for time, then w, then h.

    Args:
        grid: Patches along each axis.
        dim: Model width, divisible by 16.
        interpolation: Positions along (t, h, w) are divided by these.
        times: Positions in time of frames with the rows and columns of `grid`; None: 0, 1, 2...

    Returns:
        fp32 `[tokens, dim]`.

    Source: zai-org/CogVideo@7a1af71 `sat/dit_video_concat.py` `get_3d_sincos_pos_embed`.
    """
    positions = [torch.arange(count, dtype=torch.float32, device=device) for count in grid]
    if times is not None:
        positions[0] = torch.tensor(times, dtype=torch.float32, device=device)
    t, h, w = (
        _axis_sincos(axis / scale, width)
        for axis, scale, width in zip(
            positions, interpolation, (dim // 4, dim // 8 * 3, dim // 8 * 3), strict=True
        )
    )
    size = (len(t), grid.height, grid.width)
    parts = (t[:, None, None], w[None, None], h[None, :, None])
    return torch.cat([part.expand(*size, -1) for part in parts], dim=-1).flatten(0, 2)


def _axis_sincos(positions: Tensor, dim: int) -> Tensor:
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim / 2)
    angles = torch.outer(positions.double(), 10000.0**-exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()

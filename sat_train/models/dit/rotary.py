"""Rotary positions (5B, 1.5), and the learned table besides them (5B-I2V)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_train.config import NetworkSpec
from sat_train.config.parts.position_parts import Rotary3DPositionEmbeddingParams
from sat_train.models.dit.embedding import PatchGrid
from sat_train.models.dit.positions import Device, PositionEmbedding, check_size, is_prefix


class RotaryPositions(PositionEmbedding):
    """Rotates queries and keys (5B, 1.5), and adds a learned table besides (5B-I2V).

    Args:
        params: Its settings.
        spec: The transformer; a learned table has the size of its pre-training.
    """

    def __init__(self, params: Rotary3DPositionEmbeddingParams, spec: NetworkSpec) -> None:
        super().__init__()
        self.text_length, self.size_policy = params.text_length, params.size_policy
        self.base = base = PatchGrid(*spec.trained_patches)
        self._angles = functools.partial(
            rotary_angles,
            head_dim=spec.head_width,
            base=base,
            fit_to_base=spec.family == "1.0",
            interpolation=spec.interpolation,
            theta=params.theta,
        )
        self._tables: dict[tuple[PatchGrid, int, torch.device], Tensor] = {}
        self.pos_embedding = None
        if params.learnable_pos_embed:
            table = torch.zeros(1, params.text_length + base.tokens, spec.width)
            self.pos_embedding = nn.Parameter(table)

    def forward(self, grid: PatchGrid, text_length: int) -> Tensor:
        """Returns the learned embedding, `[1, text_length + grid.tokens, d]`."""
        assert self.pos_embedding is not None, "these positions have no learned table"
        assert text_length <= self.text_length, f"{text_length} text tokens, {self.text_length} learned"
        text, video = self.pos_embedding[0].split([self.text_length, self.base.tokens])
        if not is_prefix(self.base, grid):
            check_size(self.base, grid, size_policy=self.size_policy)
            video = interpolate_table(video, self.base, grid)
        return torch.cat([text[:text_length], video[: grid.tokens]])[None]

    def position_embedding_forward(self, grid: PatchGrid, text_length: int) -> Tensor | None:
        """SAT hook: positions that are added to the tokens; None without a learned table."""
        return None if self.pos_embedding is None else self(grid, text_length)

    def rotation(self, grid: PatchGrid, text_length: int, device: torch.device) -> Tensor:
        """Returns cosine and sine of the angles of all tokens, fp32 `[l, k / 2, 2]`; text is not rotated."""
        key = (grid, text_length, device)
        if key not in self._tables:
            # training may save for its backward a table that sampling has computed first
            with torch.inference_mode(False):
                angles = F.pad(self.angles(grid, device), (0, 0, text_length, 0))
                self._tables[key] = torch.stack([angles.cos(), angles.sin()], dim=-1)
        return self._tables[key]

    def angles(self, grid: PatchGrid, device: torch.device) -> Tensor:
        """Returns the rotary angles of the patches, fp32 `[grid.tokens, k / 2]`."""
        return self._angles(grid, device=device)


def rotary_angles(
    grid: PatchGrid,
    *,
    head_dim: int,
    base: PatchGrid,
    fit_to_base: bool,
    interpolation: tuple[float, float, float] = (1.0, 1.0, 1.0),
    theta: float = 10000.0,
    device: Device = "cpu",
) -> Tensor:
    """Returns the rotary angles of every patch: a quarter for time, three eighths each for h and w.

    Args:
        grid: The real size.
        head_dim: Width of a head, divisible by 16.
        base: The size of pre-training.
        fit_to_base: True (1.0): rows and columns are spread over the largest centred part of `base` that has
            their shape, as diffusers does when it samples 1.0 at another size; at the base size that is
            0, 1, 2... False (1.5): always 0, 1, 2...
        interpolation: Positions along (t, h, w) are divided by these.
        theta: Base of the frequencies.

    Returns:
        fp32 `[grid.tokens, head_dim / 2]`, computed in fp64.

    Source: zai-org/CogVideo@7a1af71 `Rotary3DPositionEmbeddingMixin`; huggingface/diffusers@0.42
        `CogVideoXPipeline._prepare_rotary_positional_embeddings`.
    """
    rows, columns = _fit_to_base(grid, base) if fit_to_base else ((0, grid.height), (0, grid.width))
    widths = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    t, h, w = (
        _axis_angles(_spread(*span, count, device) / scale, width, theta)
        for span, count, scale, width in zip(
            ((0, grid.frames), rows, columns), grid, interpolation, widths, strict=True
        )
    )
    parts = (t[:, None, None], h[None, :, None], w[None, None])
    return torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).flatten(0, 2).float()


def _axis_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    return torch.outer(positions, theta**-exponents)


def _spread(first: int, end: int, count: int, device: Device) -> Tensor:
    # diffusers scales the end, not the distance: the last position is end * (n - 1) / n whatever the start
    return torch.linspace(first, end * (count - 1) / count, count, dtype=torch.float64, device=device)


def _fit_to_base(grid: PatchGrid, base: PatchGrid) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns (first, end) of the rows and of the columns."""
    if grid.height / grid.width > base.height / base.width:
        height, width = base.height, round(base.height / grid.height * grid.width)
    else:
        height, width = round(base.width / grid.width * grid.height), base.width
    top, left = round((base.height - height) / 2), round((base.width - width) / 2)
    return (top, top + height), (left, left + width)


def interpolate_table(table_ld: Tensor, own: PatchGrid, grid: PatchGrid) -> Tensor:
    """Stretches a learned table over another height and width, and over time when there are more frames.

    Args:
        table_ld: One row a patch of `own`, `[own.tokens, d]`.
        grid: The real size.

    Returns:
        `[grid.tokens, d]`.
    """
    cube = table_ld.unflatten(0, tuple(own))[: grid.frames].permute(3, 0, 1, 2)[None]
    stretched = F.interpolate(cube.float(), size=tuple(grid), mode="trilinear", align_corners=False)
    return stretched[0].permute(1, 2, 3, 0).flatten(0, 2).to(table_ld.dtype)

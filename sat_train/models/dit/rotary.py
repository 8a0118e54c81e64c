"""Rotary positions (5B, 1.5), and the learned table besides them (5B-I2V)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_train.config import NetworkSpec
from sat_train.config.parts.position_parts import Rotary3DPositionEmbeddingParams
from sat_train.errors import SatTrainError
from sat_train.models.dit.embedding import PatchGrid
from sat_train.models.dit.positions import Device, PositionEmbedding, Times, check_size, is_prefix


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
        self._tables: dict[tuple[Any, ...], Tensor] = {}
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
        return self._table(
            (grid, text_length, device), lambda: F.pad(self.angles(grid, device), (0, 0, text_length, 0))
        )

    def angles(self, grid: PatchGrid, device: torch.device) -> Tensor:
        """Returns the rotary angles of the patches, fp32 `[grid.tokens, k / 2]`."""
        return self._angles(grid, device=device)

    def frame_positions(self, grid: PatchGrid, times: Times) -> Tensor | None:
        """Returns the rows of the learned table at these times; None without one.

        Raises:
            SatTrainError: A time is outside of the table, or between its rows.
        """
        if self.pos_embedding is None:
            return None
        if not all(time in range(self.base.frames) for time in times):
            raise SatTrainError(
                f"the learned table of positions has no row for appended frames at the times {list(times)}",
                expected=f"times of the table: whole numbers from 0 to {self.base.frames - 1}",
                remedy="give frame_index_f frames of the clip, 0 is the first",
            )
        rows = [int(time) for time in times]
        own: Tensor = self(PatchGrid(max(rows) + 1, *grid[1:]), 0)[0].unflatten(0, (-1, grid[1] * grid[2]))
        return own[rows].flatten(0, 1)[None]

    def frame_rotation(self, grid: PatchGrid, times: Times, device: torch.device) -> Tensor:
        """Returns cosine and sine of the angles of appended frames."""
        return self._table((grid, times, device), lambda: self.frame_angles(grid, times, device))

    def frame_angles(self, grid: PatchGrid, times: Times, device: torch.device) -> Tensor:
        """Returns the rotary angles of appended frames at any times, fp32 `[tokens, k / 2]`.

        Raises:
            SatTrainError: A subclass has other angles, and does not say which they are here.
        """
        if type(self).angles is not RotaryPositions.angles:
            raise SatTrainError(
                f"{type(self).__name__} has its own angles, and none for frames that are appended in time",
                expected="a method frame_angles(grid, times, device) next to angles",
            )
        return self._angles(grid, times=times, device=device)

    def _table(self, key: tuple[Any, ...], angles: Callable[[], Tensor]) -> Tensor:
        if key not in self._tables:
            # training may save for its backward a table that sampling has computed first
            with torch.inference_mode(False):
                own = angles()
                self._tables[key] = torch.stack([own.cos(), own.sin()], dim=-1)
        return self._tables[key]


def rotary_angles(
    grid: PatchGrid,
    *,
    head_dim: int,
    base: PatchGrid,
    fit_to_base: bool,
    interpolation: tuple[float, float, float] = (1.0, 1.0, 1.0),
    theta: float = 10000.0,
    times: Times | None = None,
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
        times: Positions in time of frames with the rows and columns of `grid`; None: 0, 1, 2...

    Returns:
        fp32 `[tokens, head_dim / 2]`, computed in fp64.

    Source: zai-org/CogVideo@7a1af71 `Rotary3DPositionEmbeddingMixin`; huggingface/diffusers@0.42
        `CogVideoXPipeline._prepare_rotary_positional_embeddings`.
    """
    rows, columns = _fit_to_base(grid, base) if fit_to_base else ((0, grid.height), (0, grid.width))
    widths = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    spans = ((0, grid.frames), rows, columns)
    positions = [_spread(*span, count, device) for span, count in zip(spans, grid, strict=True)]
    if times is not None:
        positions[0] = torch.tensor(times, dtype=torch.float64, device=device)
    t, h, w = (
        _axis_angles(axis / scale, width, theta)
        for axis, scale, width in zip(positions, interpolation, widths, strict=True)
    )
    size = (len(t), grid.height, grid.width)
    parts = (t[:, None, None], h[None, :, None], w[None, None])
    return torch.cat([part.expand(*size, -1) for part in parts], dim=-1).flatten(0, 2).float()


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

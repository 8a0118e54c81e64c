"""Position embeddings: sine-cosine tables (2B), rotary angles (5B, 1.5) and learned tables (5B-I2V)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from sat.model.base_model import BaseMixin
from torch import Tensor, nn

from sat_train.config import NetworkSpec
from sat_train.errors import ConfigError, Fault
from sat_train.models.dit.grid import PatchGrid

Device = torch.device | str

_SIZE_POLICY_KEY = "model.network_config.params.modules.pos_embed_config.params.size_policy"


def sincos_table(
    grid: PatchGrid,
    dim: int,
    *,
    interpolation: tuple[float, float, float] = (1.0, 1.0, 1.0),
    device: Device = "cpu",
) -> Tensor:
    """Returns the sine-cosine embedding of every patch: a quarter of the width for time, then w, then h.

    Args:
        grid: Patches along each axis.
        dim: Model width, divisible by 16.
        interpolation: Positions along (t, h, w) are divided by these.

    Returns:
        fp32 `[grid.tokens, dim]`.

    Source: zai-org/CogVideo@7a1af71 `sat/dit_video_concat.py` `get_3d_sincos_pos_embed`.
    """
    t, h, w = (
        _axis_sincos(torch.arange(count, dtype=torch.float32, device=device) / scale, width)
        for count, scale, width in zip(
            grid, interpolation, (dim // 4, dim // 8 * 3, dim // 8 * 3), strict=True
        )
    )
    parts = (t[:, None, None], w[None, None], h[None, :, None])
    return torch.cat([part.expand(*grid, -1) for part in parts], dim=-1).flatten(0, 2)


def _axis_sincos(positions: Tensor, dim: int) -> Tensor:
    exponents = torch.arange(dim // 2, dtype=torch.float64, device=positions.device) / (dim / 2)
    angles = torch.outer(positions.double(), 10000.0**-exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


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


def rotate_pairs(x_bnlk: Tensor, cos_lk: Tensor, sin_lk: Tensor) -> Tensor:
    """Rotates each pair of neighbouring channels by its token's angle, in fp32.

    Args:
        x_bnlk: Queries or keys, `[b, n, l, k]`.
        cos_lk: fp32 `[l, k / 2]`.
        sin_lk: fp32 `[l, k / 2]`.

    Returns:
        `[b, n, l, k]` in the dtype of `x_bnlk`.
    """
    a, b = x_bnlk.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([a * cos_lk - b * sin_lk, b * cos_lk + a * sin_lk], dim=-1)
    return rotated.flatten(-2).to(x_bnlk.dtype)


def is_prefix(own: PatchGrid, grid: PatchGrid) -> bool:
    """Returns whether a table for `own` begins with that for `grid`: the same area, and no more frames."""
    return grid[1:] == own[1:] and grid.frames <= own.frames


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


def check_size(own: PatchGrid, grid: PatchGrid, *, size_policy: str) -> None:
    """Checks whether a table may serve another size.

    Raises:
        ConfigError: The policy is `refuse`.
    """
    if size_policy == "refuse":
        expected = f"{own} patches (frames x height x width), as the position table has, not {grid}"
        remedy = "train at that size, or set the policy to interpolate"
        raise ConfigError([Fault(_SIZE_POLICY_KEY, size_policy, f"{expected}; {remedy}")])


class SincosPositions(BaseMixin):
    """Adds a fixed sine-cosine table (CogVideoX-2B). It is a buffer: saved with the weights, never trained.

    Args:
        base: Patches at the size of pre-training.
        dim: Model width.
        text_length: Text tokens; their rows are zero.
        interpolation: Positions along (t, h, w) are divided by these.
        size_policy: At other sizes `refuse`, or `interpolate`: the formula gives the table, as in diffusers.
    """

    def __init__(
        self,
        *,
        base: PatchGrid,
        dim: int,
        text_length: int,
        interpolation: tuple[float, float, float],
        size_policy: str,
    ) -> None:
        super().__init__()
        self.base, self.text_length, self.interpolation = base, text_length, interpolation
        self.size_policy = size_policy
        table = sincos_table(base, dim, interpolation=interpolation, device=torch.get_default_device())
        table = F.pad(table, (0, 0, text_length, 0))[None]
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


class RotaryPositions(BaseMixin):
    """Rotates queries and keys (5B, 1.5), and adds a learned table besides (5B-I2V).

    Args:
        base: Patches at the size of pre-training.
        head_dim: Width of a head.
        fit_to_base: See `rotary_angles`.
        interpolation: Positions along (t, h, w) are divided by these.
        theta: Base of the frequencies.
        learned_dim: Model width when a learned table is added, else None.
        text_length: Text tokens of the learned table.
        size_policy: At other sizes `refuse`, or `interpolate` the learned table.
    """

    def __init__(
        self,
        *,
        base: PatchGrid,
        head_dim: int,
        fit_to_base: bool,
        interpolation: tuple[float, float, float],
        theta: float,
        learned_dim: int | None,
        text_length: int,
        size_policy: str,
    ) -> None:
        super().__init__()
        self.base, self.text_length, self.size_policy = base, text_length, size_policy
        self._angles = functools.partial(
            rotary_angles,
            head_dim=head_dim,
            base=base,
            fit_to_base=fit_to_base,
            interpolation=interpolation,
            theta=theta,
        )
        self._tables: dict[tuple[PatchGrid, int, torch.device], tuple[Tensor, Tensor]] = {}
        self.pos_embedding = None
        if learned_dim is not None:
            self.pos_embedding = nn.Parameter(torch.zeros(1, text_length + base.tokens, learned_dim))

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

    def rotary_tables(self, grid: PatchGrid, text_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of all tokens, fp32 `[l, k / 2]`; text tokens are not rotated."""
        key = (grid, text_length, device)
        if key not in self._tables:
            # training may save for its backward a table that sampling has computed first
            with torch.inference_mode(False):
                angles = F.pad(self._angles(grid, device=device), (0, 0, text_length, 0))
                self._tables[key] = (angles.cos(), angles.sin())
        return self._tables[key]


def build_positions(spec: NetworkSpec) -> SincosPositions | RotaryPositions:
    """Builds the positions of a transformer, with tables for the size of pre-training."""
    own = spec.positions
    base = PatchGrid(*(size // patch for size, patch in zip(own.latent_size, spec.patch, strict=True)))
    if own.kind == "sincos":
        return SincosPositions(
            base=base,
            dim=spec.width,
            text_length=own.text_length,
            interpolation=own.interpolation,
            size_policy=own.size_policy,
        )
    return RotaryPositions(
        base=base,
        head_dim=spec.head_width,
        fit_to_base=spec.family == "1.0",
        interpolation=own.interpolation,
        theta=own.theta,
        learned_dim=spec.width if own.kind == "rotary_learned" else None,
        text_length=own.text_length,
        size_policy=own.size_policy,
    )

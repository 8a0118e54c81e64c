"""Overlapping, blended spatial tiles, which bound the VAE's memory by the tile instead of the picture.

Each tile is coded as a picture of its own (own borders, own norm statistics), so the result is near the
untiled one, not equal to it.

Source: diffusers 0.42 `autoencoder_kl_cogvideox.py` tiled_encode, tiled_decode; tiles, overlaps and linear
blending are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Tile sizes in pixels, all multiples of the VAE's spatial compression.

    Args:
        height: Of a tile.
        width: Of a tile.
        overlap_height: What a tile shares with the one above it.
        overlap_width: What a tile shares with the one to its left.
    """

    height: int = 240
    width: int = 360
    overlap_height: int = 40
    overlap_width: int = 72

    def is_needed(self, height: int, width: int) -> bool:
        """Returns whether a picture of this size is larger than one tile."""
        return height > self.height or width > self.width


def _blend_in(previous: Tensor, tile: Tensor, extent: int, dim: int) -> Tensor:
    """Fades from the end of `previous` into the start of `tile` along `dim`."""
    extent = min(previous.shape[dim], tile.shape[dim], extent)
    shape = [1] * tile.dim()
    shape[dim] = extent
    weight = (
        (torch.arange(extent, device=tile.device, dtype=torch.float32) / extent).to(tile.dtype).view(shape)
    )
    seam = previous.narrow(dim, previous.shape[dim] - extent, extent)
    faded = seam * (1 - weight) + tile.narrow(dim, 0, extent) * weight
    return torch.cat([faded, tile.narrow(dim, extent, tile.shape[dim] - extent)], dim=dim)


def code_in_tiles(
    x: Tensor,
    code: Callable[[Tensor], Tensor],
    *,
    tile_in: tuple[int, int],
    overlap_in: tuple[int, int],
    tile_out: tuple[int, int],
    overlap_out: tuple[int, int],
    grid: tuple[int, int],
) -> Tensor:
    """Codes a clip tile by tile and blends the results.

    Args:
        x: (b, c, t, h, w).
        code: Codes one tile, a whole clip of it.
        tile_in: Height and width of a tile of x.
        overlap_in: Of neighbouring tiles of x.
        tile_out: Height and width of a coded tile.
        overlap_out: Of neighbouring coded tiles; how far they are blended.
        grid: How many rows and columns of tiles cover x.

    Returns:
        (b, c', t', h', w').
    """
    stride = (tile_in[0] - overlap_in[0], tile_in[1] - overlap_in[1])
    keep = (tile_out[0] - overlap_out[0], tile_out[1] - overlap_out[1])
    above: list[Tensor] = []
    rows = []
    for i in range(grid[0]):
        row: list[Tensor] = []
        for j in range(grid[1]):
            top, left = i * stride[0], j * stride[1]
            tile = code(x[..., top : top + tile_in[0], left : left + tile_in[1]])
            if i > 0:
                tile = _blend_in(above[j], tile, overlap_out[0], dim=3)
            if j > 0:
                tile = _blend_in(row[-1], tile, overlap_out[1], dim=4)
            row.append(tile)
        rows.append(torch.cat([tile[..., : keep[0], : keep[1]] for tile in row], dim=4))
        above = row
    return torch.cat(rows, dim=3)

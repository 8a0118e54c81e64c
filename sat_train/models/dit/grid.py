"""The video as a grid of patches."""

from __future__ import annotations

from typing import NamedTuple

from einops import rearrange
from torch import Tensor


class PatchGrid(NamedTuple):
    """Number of patches along each axis; tokens run over frames, then rows, then columns."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Video tokens in all."""
        return self.frames * self.height * self.width

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def to_patches(latent_btchw: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Cuts a latent into patches of (o, p, q), `[b, t, h, w, c * o * p * q]`."""
    o, p, q = patch_size
    patches: Tensor = rearrange(latent_btchw, "b (t o) c (h p) (w q) -> b t h w (c o p q)", o=o, p=p, q=q)
    return patches

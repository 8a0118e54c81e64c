"""The video as a grid of patches, and what every block of one forward shares."""

from __future__ import annotations

from typing import NamedTuple

from sat.model.transformer import BaseTransformerLayer
from torch import Tensor, nn


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


class BlockContext(NamedTuple):
    """What every block of one forward shares.

    Args:
        emb_bd: Timestep (and `ofs`) features, `[b, time_embed_dim]`.
        is_text_l1: True at text tokens, which come first, `[l, 1]`.
        cos_lk: Cosine of each token's rotary angles, fp32 `[l, k / 2]`; 1 at text tokens. None: no rotary.
        sin_lk: Sine of the same; 0 at text tokens.
    """

    emb_bd: Tensor
    is_text_l1: Tensor
    cos_lk: Tensor | None
    sin_lk: Tensor | None


class Block(NamedTuple):
    """The modules of one layer, which SAT keeps partly in `transformer.layers`, partly in `adaln_layer`."""

    layer: BaseTransformerLayer
    modulation: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None

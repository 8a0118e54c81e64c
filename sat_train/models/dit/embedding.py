"""Patches of a latent, their embedding and that of time, and the map back: the final layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from sat.model.base_model import BaseMixin
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


def to_patches(latent_btchw: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """Cuts a latent into patches of (o, p, q), `[b, t, h, w, c * o * p * q]`."""
    o, p, q = patch_size
    patches: Tensor = rearrange(latent_btchw, "b (t o) c (h p) (w q) -> b t h w (c o p q)", o=o, p=p, q=q)
    return patches


def timestep_features(values_b: Tensor, dim: int) -> Tensor:
    """Returns cosines, then sines, of a timestep at geometric frequencies.

    Args:
        values_b: Timesteps or `ofs` values, any number type, `[b]`, or of any shape.
        dim: Even width.

    Returns:
        fp32 `[b, dim]`.

    Source: zai-org/CogVideo@7a1af71 `sgm/modules/diffusionmodules/util.py` `timestep_embedding`.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values_b.device) / half
    angles = values_b.float()[..., None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class PatchProjection(nn.Module):
    """A linear map of patches, its weight shaped as the released weights hold it.

    Args:
        in_channels: Channels of the latent, image condition included.
        out_features: Model width.
        patch_size: (frames, height, width) of a patch, o p q. With one frame (1.0) the weight is that of a
            convolution, `[d, c, p, q]`, else (1.5) `[d, c * o * p * q]`. A checkpoint may hold either: the
            numbers are the same, in the same order.
    """

    def __init__(
        self,
        in_channels: int,
        out_features: int,
        patch_size: tuple[int, int, int],
    ) -> None:
        super().__init__()
        frames, height, width = patch_size
        inner = (in_channels, height, width) if frames == 1 else (in_channels * frames * height * width,)
        self.weight = nn.Parameter(torch.empty(out_features, *inner))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, patches: Tensor) -> Tensor:
        """Maps `[..., c * o * p * q]` to `[..., d]`."""
        return F.linear(patches, self.weight.flatten(1), self.bias)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        weight = state_dict.get(f"{prefix}weight")
        is_whole = self.weight.dim() > 1  # under ZeRO-3 both are empty vectors
        if weight is not None and is_whole and weight.flatten(1).shape == self.weight.flatten(1).shape:
            state_dict[f"{prefix}weight"] = weight.reshape(self.weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PatchEmbed(BaseMixin):
    """Text and patches of the latent as one sequence of tokens, text first."""

    def __init__(
        self,
        *,
        in_channels: int,
        hidden_size: int,
        patch_size: tuple[int, int, int],
        text_hidden_size: int,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchProjection(in_channels, hidden_size, patch_size)
        self.text_proj = nn.Linear(text_hidden_size, hidden_size)

    def word_embedding_forward(self, latent_btchw: Tensor, text_bld: Tensor) -> Tensor:
        """SAT hook: `[b, t, c, h, w]` and `[b, l, text width]` to `[b, l + tokens, d]`."""
        patches = to_patches(latent_btchw, self.patch_size).flatten(1, 3)
        return torch.cat([self.text_proj(text_bld), self.proj(patches)], dim=1)


class FinalLayer(BaseMixin):
    """The last modulation and the map from tokens back to a latent."""

    def __init__(
        self,
        *,
        hidden_size: int,
        time_embed_dim: int,
        patch_size: tuple[int, int, int],
        out_channels: int,
        elementwise_affine: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.patch_size, self.out_channels = patch_size, out_channels
        self.norm_final = nn.LayerNorm(hidden_size, eps=eps, elementwise_affine=elementwise_affine)
        self.linear = nn.Linear(hidden_size, math.prod(patch_size) * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, 2 * hidden_size))

    def final_forward(self, video_bld: Tensor, emb_bd: Tensor, grid: PatchGrid) -> Tensor:
        """SAT hook: video tokens `[b, tokens, d]` to `[b, t, out_channels, h, w]`.

        Args:
            video_bld: Video tokens.
            emb_bd: Time features `[b, e]`, or of every patch of frames `[b, grid.frames, e]`.
            grid: Patches of the video.
        """
        shift, scale = self.adaLN_modulation(emb_bd)[..., None, :].chunk(2, dim=-1)
        normed = self.norm_final(video_bld)
        if emb_bd.dim() == 3:
            normed = normed.unflatten(1, (grid.frames, -1))
        patches = self.linear(normed * (1 + scale) + shift)
        if emb_bd.dim() == 3:
            patches = patches.flatten(1, 2)
        o, p, q = self.patch_size
        latent_btchw: Tensor = rearrange(
            patches,
            "b (t h w) (c o p q) -> b (t o) c (h p) (w q)",
            t=grid.frames,
            h=grid.height,
            w=grid.width,
            o=o,
            p=p,
            q=q,
        )
        return latent_btchw

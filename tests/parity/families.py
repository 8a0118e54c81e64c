"""The five members of the family, full-size and narrow, for our transformer and for diffusers'."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers import CogVideoXTransformer3DModel

from sat_train.models.dit.transformer import DiffusionTransformer
from tests.networks import build_network


@dataclass(frozen=True)
class Family:
    """A member of the family, as numbers both sides are built from; `latent_size` is (t, h, w)."""

    name: str
    num_layers: int
    heads: int
    in_channels: int
    latent_size: tuple[int, int, int]
    positions: str = "rotary"
    patch_frames: int = 1
    ofs: bool = False
    text_length: int = 226
    text_width: int = 4096
    time_embed_dim: int = 512
    head_dim: int = 64

    def narrow(self) -> Family:
        """Returns the same shape with 2 layers, 2 heads and small latents."""
        return replace(
            self,
            num_layers=2,
            heads=2,
            in_channels=self.in_channels // 4,
            latent_size=(5, 8, 12) if self.patch_frames == 1 else (4, 16, 14),
            text_length=6,
            text_width=24,
            time_embed_dim=32,
        )

    def ours(self, **options: object) -> DiffusionTransformer:
        """Builds this project's transformer."""
        scale = 1.875 if self.positions == "sincos" else 1.0
        return build_network(
            layers=self.num_layers,
            width=self.heads * self.head_dim,
            heads=self.heads,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            patch=(self.patch_frames, 2, 2),
            latent_size=self.latent_size,
            text_width=self.text_width,
            text_length=self.text_length,
            time_width=self.time_embed_dim,
            ofs_width=self.time_embed_dim if self.ofs else None,
            positions=self.positions,
            interpolation=(1.0, scale, scale),
            **options,
        )

    def theirs(self) -> CogVideoXTransformer3DModel:
        """Builds diffusers' transformer."""
        frames, height, width = self.latent_size
        return CogVideoXTransformer3DModel(
            num_attention_heads=self.heads,
            attention_head_dim=self.head_dim,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            time_embed_dim=self.time_embed_dim,
            ofs_embed_dim=self.time_embed_dim if self.ofs else None,
            text_embed_dim=self.text_width,
            num_layers=self.num_layers,
            sample_height=height,
            sample_width=width,
            sample_frames=(frames - 1) * 4 + 1,
            patch_size=2,
            patch_size_t=None if self.patch_frames == 1 else self.patch_frames,
            max_text_seq_length=self.text_length,
            spatial_interpolation_scale=1.875,
            use_rotary_positional_embeddings=self.positions != "sincos",
            use_learned_positional_embeddings=self.positions == "rotary_learned",
        )

    @property
    def image_to_video(self) -> bool:
        """The image latent stands beside the noised one, so twice the channels go in."""
        return self.name.endswith("i2v")

    @property
    def out_channels(self) -> int:
        """Latent channels."""
        return self.in_channels // 2 if self.image_to_video else self.in_channels


FAMILIES = (
    Family("2b", 30, 30, 16, (13, 60, 90), "sincos"),
    Family("5b", 42, 48, 16, (13, 60, 90)),
    Family("5b_i2v", 42, 48, 32, (13, 60, 90), "rotary_learned"),
    Family("1.5_5b", 42, 48, 16, (21, 300, 300), patch_frames=2),
    Family("1.5_5b_i2v", 42, 48, 32, (21, 300, 300), patch_frames=2, ofs=True),
)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fills every weight with noise, so that nothing is hidden by a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / fan_in**0.5 if parameter.dim() > 1 else 0.3 * noise + 0.7)

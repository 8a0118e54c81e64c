"""Numbers of the transformer, with the counts of weights, tokens and FLOPs that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from sat_train.config.geometry import Geometry, LatentShape
from sat_train.config.parts.position_parts import PositionConfig, TimeHeightWidth


class Flops(NamedTuple):
    """Floating-point operations of a forward pass; a multiply-add is two.

    The backward pass costs twice `linear` and twice `attention` for trained weights; for frozen weights it
    costs `linear` once, and `attention` still twice.
    """

    linear: int
    attention: int


@dataclass(frozen=True, kw_only=True)
class NetworkSpec(Geometry):
    """The diffusion transformer.

    Args:
        layers: Blocks.
        width: Model width.
        heads: Attention heads; their width must be divisible by 16.
        in_channels: Channels of the latent, plus those of the image condition and of further conditions.
        out_channels: Channels of the prediction.
        condition_channels: Channels of the input that conditions append; weights of the base lack them.
        text_width: Width of a text embedding.
        time_width: Width of the time features.
        ofs_width: Width of the `ofs` features (1.5 image-to-video), equal to `time_width`; None without.
        qk_norm: Queries and keys are normalised.
        affine_norms: Layer norms have a weight and a bias.
        positions: The position embedding.
        trained_latent: Frames, height and width of the latent of pre-training, which tables are made for.
        interpolation: Positions along time, height and width are divided by these; 2B has (1, 1.875, 1.875).
    """

    layers: int
    width: int
    heads: int
    in_channels: int
    out_channels: int
    condition_channels: int = 0
    text_width: int
    time_width: int
    ofs_width: int | None = None
    qk_norm: bool = True
    affine_norms: bool = True
    positions: PositionConfig
    trained_latent: tuple[int, int, int]
    interpolation: TimeHeightWidth = (1.0, 1.0, 1.0)

    @property
    def family(self) -> Literal["1.0", "1.5"]:
        """Release of CogVideoX that these numbers belong to: 1.5 has patches of several frames."""
        return "1.0" if self.patch[0] == 1 else "1.5"

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def text_length(self) -> int:
        """Text tokens in front of the video tokens."""
        return self.positions.params.text_length

    @property
    def trained_patches(self) -> tuple[int, ...]:
        """Patches of the latent of pre-training along time, height and width."""
        return tuple(size // side for size, side in zip(self.trained_latent, self.patch, strict=True))

    def tokens(self, latent: LatentShape) -> int:
        """Returns the tokens of one sample, text included: memory and time grow with them."""
        return self.patches(latent) + self.text_length

    def linear_layers(self) -> tuple[str, ...]:
        """Returns the names of the transformer's linear layers, which adapters may target."""
        inside = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        blocks = [f"transformer.layers.{layer}.{name}" for layer in range(self.layers) for name in inside]
        modulations = [f"mixins.adaln_layer.adaLN_modulations.{layer}.1" for layer in range(self.layers)]
        around = ["time_embed.0", "time_embed.2", "mixins.patch_embed.text_proj", "mixins.final_layer.linear"]
        ofs = [] if self.ofs_width is None else ["ofs_embed.0", "ofs_embed.2"]
        return (*blocks, *modulations, *around, "mixins.final_layer.adaLN_modulation.1", *ofs)

    def parameters(self) -> dict[str, int]:
        """Returns the numbers of weights of the transformer by part, without adapters."""
        d, e, patch = self.width, self.time_width, math.prod(self.patch)
        norm = 2 * d * self.affine_norms
        qk_norm = 4 * self.head_width * self.affine_norms * self.qk_norm
        trained_tokens = self.text_length + math.prod(self.trained_patches)
        parts = {
            "transformer.layers": self.layers * (12 * d * d + 9 * d + 2 * norm),
            "transformer.final_layernorm": norm,
            "time_embed": d * e + e + e * e + e,
            "ofs_embed": 0 if self.ofs_width is None else 2 * (e * e + e),
            "mixins.pos_embed": self.positions.params.num_weights(trained_tokens, d),
            "mixins.patch_embed": (self.in_channels * patch + self.text_width + 2) * d,
            "mixins.adaln_layer": self.layers * (12 * d * (e + 1) + qk_norm),
            "mixins.final_layer": norm + (d + 1) * patch * self.out_channels + 2 * d * (e + 1),
        }
        return {part: count for part, count in parts.items() if count}

    def flops(self, tokens: int) -> Flops:
        """Returns the FLOPs of the transformer's forward pass of one sample.

        Args:
            tokens: Of the sample, text included.
        """
        d, e = self.width, self.time_width
        video, text = tokens - self.text_length, self.text_length
        projections = video * math.prod(self.patch) * (self.in_channels + self.out_channels)
        once = d * e + e * e + 2 * d * e + 12 * d * e * self.layers + (self.ofs_width is not None) * 2 * e * e
        blocks = 12 * d * d * tokens * self.layers
        return Flops(
            linear=2 * (blocks + (projections + text * self.text_width) * d + once),
            attention=4 * tokens**2 * d * self.layers,
        )

    def training_flops(self, tokens: int, *, trains_base: bool) -> int:
        """Returns the FLOPs of the model for one sample, forward and backward, which MFU counts.

        What is recomputed does not count. Weights of 6 times the tokens would count adaLN's, a seventh of
        all, which see no token.

        Args:
            tokens: Of the sample, text included.
            trains_base: Off, only adapters and modules train; they are not counted.
        """
        flops = self.flops(tokens)
        return (3 if trains_base else 2) * flops.linear + 3 * flops.attention

"""Slot `position` (`pos_embed_config` of the network's modules) and the position embeddings of the family.

A builder gets the parameters and the `NetworkSpec`, and returns a `PositionEmbedding`
(`sat_train/models/dit/positions.py`).
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from sat_train.config.parts.registry import Choice, Params, part

SizePolicy = Literal["refuse", "interpolate"]
TimeHeightWidth = tuple[float, float, float]


class PositionParams(Params):
    """Base of the settings of position embeddings."""

    text_length: int = Field(ge=1, description="Text tokens in front of the video tokens.")

    @property
    def interpolation(self) -> TimeHeightWidth:
        """Positions along time, height and width are divided by these, and by those of the network."""
        return (1.0, 1.0, 1.0)

    @property
    def takes_any_size(self) -> bool:
        """True where latents may have another size than in pre-training."""
        return True

    def num_weights(self, tokens: int, width: int) -> int:
        """Returns the weights that train, for so many tokens of the size of pre-training, text included."""
        return 0


class PositionConfig(Choice):
    """The position embedding."""

    slot: ClassVar[str] = "position"

    target: str = Field(description="Kind of position embedding.")
    params: PositionParams = Field(description="Its settings.")


@part("position", "Sincos3DPositionEmbedding", build="sat_train.models.dit.sincos:SincosPositions")
class Sincos3DPositionEmbeddingParams(PositionParams):
    """Fixed sines and cosines of time, height and width, added to the patches (CogVideoX-2B)."""

    height_interpolation: float = Field(
        1.0, gt=0, description="Positions along the height are divided by this."
    )
    width_interpolation: float = Field(
        1.0, gt=0, description="Positions along the width are divided by this."
    )
    time_interpolation: float = Field(1.0, gt=0, description="Positions along time are divided by this.")
    size_policy: SizePolicy = Field("refuse", description="What to do at a size other than the one trained.")

    @property
    def interpolation(self) -> TimeHeightWidth:
        return self.time_interpolation, self.height_interpolation, self.width_interpolation

    @property
    def takes_any_size(self) -> bool:
        return self.size_policy == "interpolate"


@part("position", "Rotary3DPositionEmbedding", build="sat_train.models.dit.rotary:RotaryPositions")
class Rotary3DPositionEmbeddingParams(PositionParams):
    """Rotary embedding of time, height and width (CogVideoX-5B, 1.5)."""

    text_length: int = Field(
        ge=1, description="Text tokens in front of the video tokens; they are not rotated."
    )
    hidden_size_head: int | None = Field(
        None, ge=8, description="Width of a head; null: hidden_size / heads."
    )
    theta: float = Field(10000.0, gt=0, description="Base of the rotation frequencies.")
    learnable_pos_embed: bool = Field(False, description="Also add a learned table (CogVideoX-5B-I2V).")
    size_policy: SizePolicy = Field("refuse", description="What to do with a learned table at another size.")

    @property
    def takes_any_size(self) -> bool:
        return not self.learnable_pos_embed or self.size_policy == "interpolate"

    def num_weights(self, tokens: int, width: int) -> int:
        return tokens * width * self.learnable_pos_embed

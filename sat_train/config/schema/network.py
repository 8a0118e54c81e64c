"""The video diffusion transformer: its numbers, and the parts that differ between family members."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from sat_train.config.parts.adapter_parts import AdapterConfig
from sat_train.config.parts.position_parts import PositionConfig
from sat_train.config.parts.record import RecomputeChoice, Record


def _patch_to_triple(value: Any) -> Any:
    """Turns CogVideoX 1.0's `2` into `(1, 2, 2)`, and a list into a tuple."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (1, value, value)
    return tuple(value) if isinstance(value, list) else value


PatchSize = Annotated[
    tuple[int, int, int],
    BeforeValidator(_patch_to_triple),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}),
]


class ImagePatchEmbeddingParams(Record):
    """Patches of the latent and text embeddings to tokens."""

    text_hidden_size: int = Field(ge=1, description="Width of the text encoder.")


class AdaLNParams(Record):
    """Modulation of each layer by the timestep."""

    qk_ln: bool = Field(True, description="Normalise queries and keys of each head.")


class ImagePatchEmbeddingGroup(Record):
    """Patch embedding."""

    params: ImagePatchEmbeddingParams = Field(description="Its settings.")


class AdaLNGroup(Record):
    """Adaptive layer norm."""

    params: AdaLNParams = Field(AdaLNParams(), description="Its settings.")


class NetworkModules(Record):
    """SAT mixins of the transformer."""

    pos_embed_config: PositionConfig = Field(description="Position embedding.")
    patch_embed_config: ImagePatchEmbeddingGroup = Field(description="Latents and text to tokens.")
    adaln_layer_config: AdaLNGroup = Field(AdaLNGroup(), description="Modulation of each layer.")
    lora_config: AdapterConfig | None = Field(
        None, description="Adapters; null trains the weights themselves."
    )


class TransformerArgs(Record):
    """Arguments of SAT's BaseModel in CogVideo's files."""

    checkpoint_activations: RecomputeChoice = Field(
        "off", description="The same setting as `args.checkpoint_activations`."
    )
    model_parallel_size: int = Field(1, ge=1, description="The same setting as `args.model_parallel_size`.")


class DiffusionTransformerParams(Record):
    """The numbers of the transformer."""

    num_layers: int = Field(ge=1, le=1000, description="Transformer layers.")
    hidden_size: int = Field(ge=1, description="Model width.")
    num_attention_heads: int = Field(
        ge=1, description="Heads; hidden_size / heads is 64 in the whole family."
    )
    in_channels: int = Field(ge=1, description="Input channels: 16, or 32 with the latent of an image.")
    out_channels: int = Field(ge=1, description="Output channels.")
    patch_size: PatchSize = Field(
        description="Frames, height and width of a patch; one number p means [1, p, p]."
    )
    num_frames: int = Field(ge=1, description="Pixel frames that the position embedding is made for.")
    latent_height: int = Field(ge=1, description="Latent height that the position embedding is made for.")
    latent_width: int = Field(ge=1, description="Latent width that the position embedding is made for.")
    time_embed_dim: int | None = Field(
        None, ge=1, description="Width of the timestep embedding; null: hidden_size."
    )
    ofs_embed_dim: int | None = Field(
        None, ge=1, description="Width of the `ofs` embedding (1.5 image-to-video); null: no `ofs`."
    )
    elementwise_affine: bool = Field(True, description="Layer norms have a weight and a bias.")
    height_interpolation: float = Field(1.0, gt=0, description="For rotary positions: divides the height.")
    width_interpolation: float = Field(1.0, gt=0, description="For rotary positions: divides the width.")
    time_interpolation: float = Field(1.0, gt=0, description="For rotary positions: divides time.")
    transformer_args: TransformerArgs = Field(TransformerArgs(), description="SAT's own arguments.")
    modules: NetworkModules = Field(description="SAT mixins.")


class DiffusionTransformerSlot(Record):
    """The transformer."""

    target: Literal["DiffusionTransformer"] = Field(description="Kind of network.")
    params: DiffusionTransformerParams = Field(description="Its settings.")

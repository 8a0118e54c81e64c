"""The frozen helpers around the transformer: text encoder and video autoencoder."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from sat_train.config.parts.record import (
    HeightWidth,
    Ints,
    Record,
    Text,
    list_to_tuple,
)


class T5TextEncoderParams(Record):
    """T5's encoder, without attention mask, as CogVideoX was trained."""

    model_dir: Text = Field(
        description="Folder with the weights and the tokenizer, or a name on the Hugging Face hub."
    )
    max_length: int = Field(
        77, ge=1, description="Tokens of a caption; longer ones are cut, shorter ones padded."
    )


class TextEncoderGroup(Record):
    """The text encoder and how it conditions."""

    params: T5TextEncoderParams = Field(description="Its settings.")
    ucg_rate: float = Field(
        0.0, ge=0, le=1, description="Share of captions dropped in training, for guidance."
    )


class ConditionerParams(Record):
    """The encoders of the conditions."""

    emb_models: Annotated[tuple[TextEncoderGroup, ...], BeforeValidator(list_to_tuple)] = Field(
        min_length=1, max_length=1, description="The text encoder, alone in a list."
    )


class ConditionerGroup(Record):
    """The conditioner."""

    params: ConditionerParams = Field(description="Its settings.")


class VideoCoderParams(Record):
    """One half of the 3D causal autoencoder."""

    ch: int = Field(ge=1, description="Channels of the widest frame size.")
    ch_mult: Ints = Field(min_length=1, max_length=8, description="Factor on `ch` at each level.")
    num_res_blocks: int = Field(ge=1, description="Residual blocks at each level.")
    z_channels: int = Field(ge=1, description="Latent channels.")
    in_channels: int = Field(3, ge=1, description="Channels of a frame.")
    out_ch: int = Field(3, ge=1, description="Channels of a decoded frame.")
    norm_num_groups: int = Field(32, ge=1, description="Groups of the group norms.")
    temporal_compress_times: int = Field(4, ge=1, description="Pixel frames in one latent frame.")


class VideoCoderGroup(Record):
    """The encoder, or the decoder."""

    params: VideoCoderParams = Field(description="Its settings.")


class PosteriorParams(Record):
    """The posterior of a latent."""

    sample: bool = Field(True, description="Draw from the posterior in training; false takes its mean.")


class PosteriorGroup(Record):
    """Mean and log-variance for each latent value."""

    params: PosteriorParams = Field(PosteriorParams(), description="Its settings.")


class VideoVAESettings(Record):
    """The 3D causal video autoencoder, but for its halves and its posterior."""

    ckpt_path: Text = Field(description="Its weights: SAT's `3d-vae.pt`, safetensors, or a diffusers folder.")
    encode_chunk_frames: int | None = Field(
        8,
        ge=4,
        multiple_of=4,
        description="Frames encoded at once, as diffusers; null: the whole clip, as SAT.",
    )
    decode_chunk_frames: int | None = Field(
        2, ge=1, description="Latent frames decoded at once; null: the whole clip."
    )
    clips_at_once: int | None = Field(
        None, ge=1, description="Clips of a batch coded together; null: all of them."
    )
    tiling: bool = Field(False, description="Code pictures larger than a tile in tiles that are blended.")
    tile_samples: bool = Field(
        True,
        description="Decode sampled videos larger than a tile in tiles that are blended, also where `tiling` "
        "is off: a quarter of the memory at 480x720.",
    )
    tile_size: HeightWidth = Field((240, 360), description="Height and width of a tile in pixels.")
    tile_overlap: HeightWidth = Field(
        (40, 72), description="Pixels a tile shares with the one above it and with the one to its left."
    )


class VideoVAEParams(VideoVAESettings):
    """The 3D causal video autoencoder."""

    regularizer_config: PosteriorGroup = Field(PosteriorGroup(), description="The posterior.")
    encoder_config: VideoCoderGroup = Field(description="The encoder.")
    decoder_config: VideoCoderGroup = Field(description="The decoder.")


class VideoVAEGroup(Record):
    """The video autoencoder."""

    params: VideoVAEParams = Field(description="Its settings.")

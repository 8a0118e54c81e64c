"""The frozen helpers around the transformer: text encoder and video autoencoder."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from sat_train.config.schema.record import (
    HeightWidth,
    Ints,
    No,
    NoParams,
    Record,
    Text,
    Yes,
    ZeroOrOne,
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


class T5TextEncoderSlot(Record):
    """The text encoder and how it conditions."""

    target: Literal["T5TextEncoder"] = Field(description="Kind of text encoder.")
    params: T5TextEncoderParams = Field(description="Its settings.")
    ucg_rate: float = Field(
        0.0, ge=0, le=1, description="Share of captions dropped in training, for guidance."
    )
    is_trainable: No = Field(False, description="The text encoder is always frozen.")
    input_key: Literal["txt"] = Field("txt", description="It reads captions.")


class GeneralConditionerParams(Record):
    """The encoders of the conditions."""

    emb_models: Annotated[tuple[T5TextEncoderSlot, ...], BeforeValidator(list_to_tuple)] = Field(
        min_length=1, max_length=1, description="The text encoder, alone in a list."
    )


class GeneralConditionerSlot(Record):
    """The conditioner."""

    target: Literal["GeneralConditioner"] = Field("GeneralConditioner", description="Kind of conditioner.")
    params: GeneralConditionerParams = Field(description="Its settings.")


class VideoCoderParams(Record):
    """One half of the 3D causal autoencoder."""

    ch: int = Field(ge=1, description="Channels of the widest frame size.")
    ch_mult: Ints = Field(min_length=1, max_length=8, description="Factor on `ch` at each level.")
    num_res_blocks: int = Field(ge=1, description="Residual blocks at each level.")
    z_channels: int = Field(ge=1, description="Latent channels.")
    in_channels: int = Field(3, ge=1, description="Channels of a frame.")
    out_ch: int = Field(3, ge=1, description="Channels of a decoded frame.")
    double_z: Yes = Field(True, description="The encoder gives mean and log-variance.")
    attn_resolutions: Ints = Field(
        (), max_length=0, description="Empty: the family's autoencoder has no attention."
    )
    dropout: float = Field(0.0, ge=0, le=0, description="Zero: the autoencoder is frozen.")
    norm_num_groups: int = Field(32, ge=1, description="Groups of the group norms.")
    temporal_compress_times: int = Field(4, ge=1, description="Pixel frames in one latent frame.")


class VideoEncoder3DSlot(Record):
    """The encoder."""

    target: Literal["VideoEncoder3D"] = Field("VideoEncoder3D", description="Kind of encoder.")
    params: VideoCoderParams = Field(description="Its settings.")


class VideoDecoder3DSlot(Record):
    """The decoder."""

    target: Literal["VideoDecoder3D"] = Field("VideoDecoder3D", description="Kind of decoder.")
    params: VideoCoderParams = Field(description="Its settings.")


class DiagonalGaussianParams(Record):
    """The posterior of a latent."""

    sample: bool = Field(True, description="Draw from the posterior in training; false takes its mean.")


class DiagonalGaussianSlot(Record):
    """Mean and log-variance for each latent value."""

    target: Literal["DiagonalGaussian"] = Field("DiagonalGaussian", description="Kind of posterior.")
    params: DiagonalGaussianParams = Field(DiagonalGaussianParams(), description="Its settings.")


class IdentitySlot(Record):
    """Nothing: the autoencoder is not trained here."""

    target: Literal["Identity"] = Field("Identity", description="The autoencoder has no loss.")
    params: NoParams = Field(NoParams(), description="It has none.")


class VideoVAEParams(Record):
    """The 3D causal video autoencoder."""

    ckpt_path: Text = Field(description="Its weights: SAT's `3d-vae.pt`, safetensors, or a diffusers folder.")
    cp_size: ZeroOrOne = Field(0, description="Each rank codes its own clips.")
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
    tile_size: HeightWidth = Field((240, 360), description="Height and width of a tile in pixels.")
    tile_overlap: HeightWidth = Field(
        (40, 72), description="Pixels a tile shares with the one above it and with the one to its left."
    )
    loss_config: IdentitySlot = Field(IdentitySlot(), description="Not trained here.")
    regularizer_config: DiagonalGaussianSlot = Field(DiagonalGaussianSlot(), description="The posterior.")
    encoder_config: VideoEncoder3DSlot = Field(description="The encoder.")
    decoder_config: VideoDecoder3DSlot = Field(description="The decoder.")


class VideoVAESlot(Record):
    """The video autoencoder."""

    target: Literal["VideoVAE"] = Field("VideoVAE", description="Kind of autoencoder.")
    params: VideoVAEParams = Field(description="Its settings.")

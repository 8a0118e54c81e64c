"""Slot `condition` (`model.conditions.NAME`): inputs of the model besides caption and image.

A builder gets the parameters and the `ModelSpec`, and returns a `Condition`
(`sat_train/encoding/conditions/condition.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from sat_train.config.parts.record import Whole
from sat_train.config.parts.reference import FieldName, Kinds
from sat_train.config.parts.registry import Choice, Params, part

TAKEN = ("clip", "text", "image", "ofs")  # names of the package's own encodings


class ConditionParams(Params):
    """Base of the settings of a condition.

    Attributes:
        takes_image_slot: It takes the place of the first frame of image-to-video models.
        training_only: Sampling does without it, and without its fields.
        adds_rows: Its encodings `mean` and `logvar` are those of videos that lost against the clip,
            `[n, t, c, h, w]`: they join the batch as rows, for loss terms that `needs_pairs`.
    """

    takes_image_slot: ClassVar[bool] = False
    training_only: ClassVar[bool] = False
    adds_rows: ClassVar[bool] = False

    def needs_reader(self) -> bool:
        """Returns whether it does nothing unless a module or a loss term names it."""
        return False

    def channels(self, model: Any) -> int:
        """Returns the channels that it places next to the latent: the patch embedding is widened by them.

        Args:
            model: The `ModelSpec`.
        """
        return 0

    def width(self, model: Any) -> int:
        """Returns the channels of the tensor, shaped as the latent, that modules find under its name.

        Args:
            model: The `ModelSpec`.

        Returns:
            The channels; 0 where there is none, or where it is not known.
        """
        return 0


class ConditionConfig(Choice):
    """An input of the model."""

    slot: ClassVar[str] = "condition"

    target: str = Field(description="The condition.")
    params: ConditionParams = Field(description="Its settings.")
    drop: float = Field(0.0, ge=0, le=1, description="Share of the training samples in which it is dropped.")


class PlacedParams(ConditionParams):
    """Settings of conditions that stand next to the latent, or are named tensors for modules."""

    into: Literal["channels", "extras"] = Field(
        "channels",
        description="channels: the patch embedding is widened and reads it. extras: a module reads it, such "
        "as ControlBranch.",
    )

    def width(self, model: Any) -> int:
        """Returns the channels of its tensor, wherever it goes.

        Args:
            model: The `ModelSpec`.
        """
        raise NotImplementedError

    def needs_reader(self) -> bool:
        """Returns True for extras, which a module reads."""
        return self.into == "extras"

    def channels(self, model: Any) -> int:
        """Returns its channels next to the latent."""
        return self.width(model) if self.into == "channels" else 0


@part("condition", "FramesInSlot", build="sat_train.encoding.conditions.frames_in_slot:FramesInSlot")
class FramesInSlotParams(ConditionParams):
    """Known frames of the video, in the image latent of image-to-video models; the others are zero there.

    An image-to-video model gets no new weights. A text-to-video model is widened by the latent's channels.
    """

    takes_image_slot = True

    which: Literal["first", "last", "first_last", "prefix", "random", "all"] = Field(
        "first",
        description="The known frames. prefix: the first `count` latent frames. random: `count` of them.",
    )
    count: Whole = Field(1, ge=1, description="Latent frames of `prefix` and `random`.")
    field: Annotated[FieldName, Kinds("video")] | None = Field(
        None, description="Video that the frames are from; null: the clip itself."
    )
    noise_log_mean: float | None = Field(
        -3.0,
        ge=-30,
        le=1,
        description="Mean of the logarithm of the noise on the frames in training, in pixels of -1 to 1; "
        "null: none.",
    )
    noise_log_std: float = Field(0.5, ge=0, le=5, description="Its standard deviation.")

    def channels(self, model: Any) -> int:
        """Returns the latent's channels for text-to-video models."""
        return 0 if "image" in model.conditions else int(model.coder.z_channels)


@part("condition", "ControlVideo", build="sat_train.encoding.conditions.control_video:ControlVideo")
class ControlVideoParams(PlacedParams):
    """The latent of a video that is aligned with the clip: edges, depth, poses, a sketch, a source video."""

    field: Annotated[FieldName, Kinds("video")] = Field("control", description="The video.")

    def width(self, model: Any) -> int:
        """Returns the latent's channels."""
        return int(model.coder.z_channels)


@part("condition", "ControlPixels", build="sat_train.encoding.conditions.control_pixels:ControlPixels")
class ControlPixelsParams(ConditionParams):
    """The pixels of a video that is aligned with the clip, for modules such as PixelControlBranch.

    Each latent element has those of its area, in every frame of its latent frame.
    """

    field: Annotated[FieldName, Kinds("video")] = Field("control", description="The video.")

    def width(self, model: Any) -> int:
        """Returns the colours of all pixels of a latent element, in all of its frames."""
        return 3 * int(model.temporal_compression * model.spatial_compression**2)

    def needs_reader(self) -> bool:
        """Returns True: a module reads it."""
        return True


@part("condition", "PlueckerCameras", build="sat_train.encoding.conditions.cameras:PlueckerCameras")
class PlueckerCamerasParams(PlacedParams):
    """Cameras as Pluecker coordinates of the ray through each latent element, for each pixel frame."""

    intrinsics: Annotated[FieldName, Kinds("per_frame", "array")] = Field(
        "intrinsics", description="fx, fy, cx, cy in pixels, [frames, 4] or [4]; `space: intrinsics`."
    )
    poses: Annotated[FieldName, Kinds("per_frame")] = Field(
        "poses", description="Camera to world, [frames, 3, 4], [frames, 4, 4] or [frames, 12]."
    )
    relative: bool = Field(True, description="Poses are taken relative to that of the first frame.")

    def width(self, model: Any) -> int:
        """Returns six coordinates for each pixel frame of a latent frame."""
        return 6 * int(model.temporal_compression)


@part("condition", "Inpainting", build="sat_train.encoding.conditions.inpainting:Inpainting")
class InpaintingParams(PlacedParams):
    """The latent of the video with its masked part black, and the mask on the latent's grid."""

    mask: Annotated[FieldName, Kinds("mask")] = Field("mask", description="Mask; 1 is to be painted.")
    video: Annotated[FieldName, Kinds("video")] | None = Field(
        None, description="Video that is painted in; null: the clip itself."
    )
    grow: Whole = Field(
        0, ge=0, le=256, description="In training the mask grows by a random number of pixels up to this."
    )

    def width(self, model: Any) -> int:
        """Returns the latent's channels and one for the mask."""
        return int(model.coder.z_channels) + 1


@part("condition", "ReferenceFrames", build="sat_train.encoding.conditions.reference_frames:ReferenceFrames")
class ReferenceFramesParams(ConditionParams):
    """Frames that attention sees behind those of the video; they are not predicted."""

    field: Annotated[FieldName, Kinds("image", "video")] = Field("reference", description="The frames.")
    position: Literal["continue", "repeat_first"] = Field(
        "continue",
        description="Their places in time. continue: behind the video. repeat_first: those of its beginning.",
    )

    def check(self, model: Any) -> Iterable[tuple[str, str]]:
        """Yields places that a learned table of positions does not have."""
        has_table = getattr(model.positions.params, "learnable_pos_embed", False)
        if has_table and self.position == "continue":
            yield "position", "repeat_first: the learned table of this model ends with its last frame"


@part("condition", "PreferencePairs", build="sat_train.encoding.conditions.preference_pairs:PreferencePairs")
class PreferencePairsParams(ConditionParams):
    """Videos that lost against the clip, for the loss term `Preference`; the network does not see them."""

    training_only = True
    adds_rows = True

    field: Annotated[FieldName, Kinds("pair")] = Field("losers", description="The videos.")


@part("condition", "FieldValues", build="sat_train.encoding.conditions.field_values:FieldValues")
class FieldValuesParams(ConditionParams):
    """The numbers of a field as they are, a named tensor for modules: SAT's `batch2model_keys`."""

    field: Annotated[FieldName, Kinds("per_frame", "array")] = Field(description="The numbers.")
    frames: Literal["pixel", "mean", "last", "stack"] = Field(
        "pixel",
        description="Rows of a `per_frame` field. pixel: one for each frame. Others: one a latent frame, "
        "the mean or the last of its frames, or a stack of them.",
    )

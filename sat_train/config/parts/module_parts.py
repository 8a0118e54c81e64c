"""Slot `module` (`model.modules.NAME`): network modules that act inside the transformer.

A builder gets the parameters and the `ModelSpec`, and returns a `Mixin` (`sat_train/models/dit/mixin.py`).
Its weights are `mixins.NAME.*`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from pydantic import Field

from sat_train.config.parts.record import Whole
from sat_train.config.parts.reference import ConditionName
from sat_train.config.parts.registry import Choice, Params, part

TAKEN = (
    "pos_embed",
    "patch_embed",
    "adaln_layer",
    "final_layer",
    "lora",
)  # names of the package's own mixins


class ModuleParams(Params):
    """Base of the settings of a network module."""


class ModuleConfig(Choice):
    """A network module."""

    slot: ClassVar[str] = "module"

    target: str = Field(description="The module.")
    params: ModuleParams = Field(description="Its settings.")


@part("module", "ControlBranch", build="sat_train.models.dit.control_branch:ControlBranch")
class ControlBranchParams(ModuleParams):
    """A branch next to the first blocks, which reads a condition and adds to the base's blocks.

    Its blocks are copies of the base's, or new and narrow ones; it begins by adding nothing.
    """

    condition: ConditionName = Field(
        "control", description="Condition that it reads: a tensor of the latent's frames, height and width."
    )
    blocks: Whole = Field(6, ge=1, description="Blocks of the branch.")
    heads: Whole | None = Field(
        None,
        ge=1,
        description="Heads of new blocks, of the base's head width; null: copies of the base's blocks.",
    )
    spread: bool = Field(
        False, description="Every block of the base gets the branch, in equal groups; false: the first ones."
    )
    channels: Whole | None = Field(
        None, ge=1, description="Channels of the condition; null: those that the condition states."
    )

    def check(self, model: Any) -> Iterable[tuple[str, str]]:
        """Yields a branch that is longer than the base, and a condition of unknown channels."""
        if self.blocks > model.layers:
            yield "blocks", f"at most the {model.layers} blocks of the model"
        width = model.condition_widths.get(self.condition, 0)
        if not width and self.channels is None:
            yield "channels", f"those of {self.condition}, which states none for modules (into: extras)"
        elif width and self.channels not in (None, width):
            yield "channels", f"{width}, the channels of the condition {self.condition}"


@part("module", "PixelControlBranch", build="sat_train.models.dit.pixel_control_branch:PixelControlBranch")
class PixelControlBranchParams(ModuleParams):
    """The branch of TheDenk/cogvideox-controlnet, which reads the pixels of a control video.

    `sat-train convert --to controlnet` writes it in the layout of that project.
    """

    condition: ConditionName = Field("control", description="Condition that it reads: ControlPixels.")
    blocks: Whole = Field(8, ge=1, description="Blocks of the branch, `num_layers` there.")
    heads: Whole | None = Field(
        None,
        ge=1,
        description="Heads, of the base's head width; null: copies of the base's first blocks. The released "
        "branches of 2B and of 5B have 30.",
    )
    projections: bool = Field(
        True,
        description="Linear layers behind the blocks, `out_projectors` there, that begin at zero; the "
        "released branches of 5B have them. false: states are added as they are, as in those of 2B.",
    )
    weight: float = Field(
        1.0, ge=0, le=100, description="Factor on what is added, `controlnet_weights` there."
    )

    def check(self, model: Any) -> Iterable[tuple[str, str]]:
        """Yields a branch that does not fit the base, and a condition that gives no pixels."""
        if self.blocks > model.layers:
            yield "blocks", f"at most the {model.layers} blocks of the model"
        if self.heads not in (None, model.heads) and not self.projections:
            yield "projections", f"true: {self.heads} heads are not as wide as the model's {model.heads}"
        width = model.condition_widths.get(self.condition, 0)
        if not width or width % (model.temporal_compression * model.spatial_compression**2):
            yield "condition", "a condition that gives modules pixels: ControlPixels"

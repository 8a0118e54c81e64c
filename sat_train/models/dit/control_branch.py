"""A branch of blocks next to the first ones of the base, which reads a condition: ControlNet and its kin."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sat_train.config import ModelSpec
from sat_train.config.parts.module_parts import ControlBranchParams
from sat_train.models.dit.block import DitBlock
from sat_train.models.dit.context import BlockContext, Extras, ForwardContext
from sat_train.models.dit.initialization import zero_
from sat_train.models.dit.mixin import Mixin
from sat_train.models.dit.stack import BlockStack


class ControlBranch(Mixin):
    """Adds the states of a branch to the video tokens of the base, through projections that begin at zero.

    The branch reads the base's embedded tokens plus the embedded condition. Copied blocks begin as the base's
    first ones. New blocks, of few heads, read the tokens through one more projection, and begin as the
    identity.

    Args:
        params: Its settings.
        model: Numbers of the base.

    Source: TheDenk/cogvideox-controlnet@e21a4a3, except that states are added through projections that begin
        at zero, and that the condition is a latent and not pixels; snap-research/ac3d@fe40a8d (narrow
        blocks); TencentARC/VideoPainter@bbab6cd (spread over all blocks).
    """

    params: ControlBranchParams

    def __init__(self, params: ControlBranchParams, model: ModelSpec) -> None:
        super().__init__(params, model)
        channels = params.channels or model.condition_widths[params.condition]
        volume = model.patch[0] * model.patch[1] * model.patch[2]
        self.stack = BlockStack(model, layers=params.blocks, heads=params.heads)
        self.embed = nn.Linear(channels * volume, self.stack.width)
        self.narrow = nn.Linear(model.width, self.stack.width) if params.heads is not None else None
        served = model.layers if params.spread else params.blocks
        self.sources = {block: block * params.blocks // served for block in range(served)}
        self.per_block = nn.ModuleDict(
            {str(block): zero_(nn.Linear(self.stack.width, model.width)) for block in self.sources}
        )

    @property
    def _states(self) -> str:
        return f"{self.name}_states"  # a condition may have the module's name

    def reinit(self, dit: Any = None) -> None:
        """Copies the base's first blocks, where the branch has blocks of their width."""
        if self.narrow is None and dit is not None:
            self.stack.copy_from(dit, range(self.params.blocks))

    def before_blocks(self, hidden_bld: Tensor, forward: ForwardContext) -> Extras:
        """Runs the branch; each block of the base gets the state of its block."""
        control_bthwd = self.embed(forward.patches(forward.given(self.params.condition)))
        own_bld = hidden_bld if self.narrow is None else self.narrow(hidden_bld)
        states = self.stack.run(own_bld + forward.block.tokens(control_bthwd), forward)
        return {self._states: {block: states[source] for block, source in self.sources.items()}}

    def after_block(self, x_bld: Tensor, *, part: Any, block: DitBlock, context: BlockContext) -> Tensor:
        """Returns the projected state of the branch at video tokens."""
        return context.tokens(part(context.video(context.extras[self._states])))

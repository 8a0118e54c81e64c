"""The module in torch.

Source: snap-research/ac3d@fe40a8d.
"""

import torch
from torch import nn

from sat_train.extend import BlockStack, Mixin, zero_


class CameraBranch(Mixin):
    """Narrow blocks that read the embedded tokens and the rays of the camera."""

    def __init__(self, params, model):
        super().__init__(params, model)
        self.stack = BlockStack(model, layers=params.blocks, heads=params.heads)
        width = self.stack.width
        self.embed = nn.Linear(params.channels * torch.Size(model.patch).numel(), width)
        self.narrow = nn.Linear(model.width, width)
        gates = {str(block): nn.Linear(width, model.width) for block in range(params.blocks)}
        self.per_block = zero_(nn.ModuleDict(gates))

    def before_blocks(self, hidden_bld, forward):
        rays_bthwd = self.embed(forward.patches(forward.extras[self.params.condition]))
        states = self.stack.run(self.narrow(hidden_bld) + forward.block.tokens(rays_bthwd), forward)
        # a factor, not a skip: every rank makes the same calls
        last = self.model.schedule.num_timesteps
        active_b = forward.timesteps_b >= self.params.active_from * last
        return {self.name: states, f"{self.name}_active": active_b.to(hidden_bld)[:, None, None]}

    def after_block(self, x_bld, *, part, block, context):
        delta_bthwd = part(context.video(context.extras[self.name]))
        return context.extras[f"{self.name}_active"] * context.tokens(delta_bthwd)

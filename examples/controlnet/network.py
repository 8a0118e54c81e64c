"""The module in torch.

Source: TheDenk/cogvideox-controlnet@8033643 `cogvideo_controlnet.py`.
"""

import torch
from torch import nn

from sat_train.extend import BlockStack, Mixin, zero_


class PixelControlNet(Mixin):
    """Encodes the control, adds it to the embedded tokens, and runs the copied blocks on them."""

    def __init__(self, params, model):
        super().__init__(params, model)
        inside, width = model.condition_widths[params.condition], params.width
        self.encode = nn.Sequential(
            nn.Conv3d(inside, 2 * width, 1),
            nn.GroupNorm(2, 2 * width),
            nn.SiLU(),
            nn.Conv3d(2 * width, width, 1),
        )
        self.embed = nn.Linear(width * torch.Size(model.patch).numel(), model.width)
        self.stack = BlockStack(model, layers=params.blocks)
        gates = {str(block): nn.Linear(model.width, model.width) for block in range(params.blocks)}
        self.per_block = zero_(nn.ModuleDict(gates))

    def reinit(self, dit=None):
        self.stack.copy_from(dit, range(self.params.blocks))

    def before_blocks(self, hidden_bld, forward):
        control_btchw = forward.extras[self.params.condition]
        encoded_btchw = self.encode(control_btchw.transpose(1, 2)).transpose(1, 2)
        control_bthwd = self.embed(forward.patches(encoded_btchw))
        return {self.name: self.stack.run(hidden_bld + forward.block.tokens(control_bthwd), forward)}

    def after_block(self, x_bld, *, part, block, context):
        return context.tokens(part(context.video(context.extras[self.name])))

"""The module in torch.

Source: TencentARC/VideoPainter@bbab6cd, and arXiv:2503.05639 section 3.2.
"""

import torch
from torch import nn

from sat_train.extend import BlockStack, Mixin, zero_


class ContextBranch(Mixin):
    """Reads noised latent, masked video and mask; adds to tokens outside of the mask alone."""

    def __init__(self, params, model):
        super().__init__(params, model)
        channels = model.coder.z_channels + 1  # the masked video, and the mask behind it
        self.embed = nn.Linear(channels * torch.Size(model.patch).numel(), model.width)
        self.stack = BlockStack(model, layers=params.blocks)
        gates = {str(block): nn.Linear(model.width, model.width) for block in range(model.layers)}
        self.per_block = zero_(nn.ModuleDict(gates))

    def reinit(self, dit=None):
        self.stack.copy_from(dit, range(self.params.blocks))

    def before_blocks(self, hidden_bld, forward):
        context_btchw = forward.extras[self.params.condition]
        context_bthwd = self.embed(forward.patches(context_btchw))
        states = self.stack.run(hidden_bld + forward.block.tokens(context_bthwd), forward)
        masked_bthw1 = forward.patches(context_btchw[:, :, -1:]).amax(-1, keepdim=True)
        group = -(-self.model.layers // self.params.blocks)  # blocks of the base that one copy serves
        dealt = {block: states[block // group] for block in range(self.model.layers)}
        return {self.name: dealt, f"{self.name}_seen": 1 - masked_bthw1}

    def after_block(self, x_bld, *, part, block, context):
        delta_bthwd = part(context.video(context.extras[self.name]))
        return context.tokens(delta_bthwd * context.extras[f"{self.name}_seen"])

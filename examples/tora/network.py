"""The module in torch.

Source: alibaba/Tora@9a23dce.
"""

import torch
from torch import nn

from sat_train.extend import Mixin, zero_


class Residual(nn.Module):
    """Two convolutions over each frame, around which the input is added."""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x):
        return x + self.body(x)


class Fuser(nn.Module):
    """`norm(x) * gamma(motion) + beta(motion)`: over space, then over time, whose weights begin at zero."""

    def __init__(self, channels, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.space = nn.Conv2d(channels, width // 2, 3, padding=1)
        self.time = zero_(nn.Conv1d(width // 2, 2 * width, 3, padding=1, padding_mode="replicate"))

    def forward(self, video_bthwd, motion_btchw):
        batch, _, height, width, _ = video_bthwd.shape
        x = self.space(motion_btchw.flatten(0, 1)).unflatten(0, (batch, -1))
        x = self.time(x.permute(0, 3, 4, 2, 1).flatten(0, 2))  # over the frames of each place
        gamma, beta = x.unflatten(0, (batch, height, width)).permute(0, 4, 1, 2, 3).chunk(2, dim=-1)
        return self.norm(video_bthwd) * gamma + beta


class MotionFuser(Mixin):
    """Extracts features of the trajectories for each block, which its fuser adds to what attention reads."""

    def __init__(self, params, model):
        super().__init__(params, model)
        channels = model.coder.z_channels * torch.Size(model.patch).numel()
        self.first = nn.Conv2d(channels, params.channels, 3, padding=1)
        self.extract = nn.ModuleList(Residual(params.channels) for _ in range(model.layers))
        fusers = {str(block): Fuser(params.channels, model.width) for block in range(model.layers)}
        self.per_block = nn.ModuleDict(fusers)

    def before_blocks(self, hidden_bld, forward):
        patches_bthwc = forward.patches(forward.extras[self.params.condition])
        x = self.first(patches_bthwc.movedim(-1, 2).flatten(0, 1))
        features = {}
        for block, residual in enumerate(self.extract):
            x = residual(x)
            features[block] = x.unflatten(0, (len(hidden_bld), -1))
        return {self.name: features}  # each block sees its own

    def attention_forward(self, x_bld, *, part, block, context, old_impl):
        fused_bthwd = part(context.video(x_bld), context.extras[self.name])
        return old_impl(x_bld + context.tokens(fused_bthwd), block=block, context=context)

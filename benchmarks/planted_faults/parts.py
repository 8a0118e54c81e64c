"""The condition and the module in torch."""

import math

import torch
from torch import nn

from sat_train.encoding.conditions.control_video import ControlVideo
from sat_train.extend import Mixin, zero_

_FRAMES, _PIXELS = 4, 8  # of the fault


class PlantedControl(ControlVideo):
    def encode(self, sample, encoders):
        video = sample.fields[self.params.field]
        if self.params.fault == "shifted":
            video = torch.cat([video[:1].expand(_FRAMES, -1, -1, -1), video[:-_FRAMES]])
        if self.params.fault == "cropped":
            rest = video[..., :-_PIXELS, :-_PIXELS].float()
            video = nn.functional.pad(rest, (_PIXELS, 0, _PIXELS, 0), mode="replicate").byte()
        return encoders.video(video, subject=sample.clip_id)


class AddControl(Mixin):
    def __init__(self, params, model):
        super().__init__(params, model)
        self.embed = nn.Linear(model.out_channels * math.prod(model.patch), model.width)
        self.per_block = zero_(nn.ModuleDict({"0": nn.Linear(model.width, model.width)}))

    def before_blocks(self, hidden_bld, forward):
        patches = forward.patches(forward.extras["control"]) * self.params.wired
        return {self.name: self.embed(patches)}

    def after_block(self, x_bld, *, part, block, context):
        return context.tokens(part(context.extras[self.name]))

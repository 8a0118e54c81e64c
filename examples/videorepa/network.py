"""Condition, module and loss term in torch.

Source: aHapBean/VideoREPA@8002687.
"""

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import interpolate, normalize

from sat_train.extend import Condition, LossTerm, Mixin


class TinyVideoEncoder(nn.Module):
    """A stand-in for VideoMAE: patches of 2 frames of 8x8 pixels, and their neighbourhood."""

    def __init__(self, width=32):
        super().__init__()
        self.patches = nn.Conv3d(3, width, (2, 8, 8), (2, 8, 8))
        self.around = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, video_bcthw):
        """Returns tokens of pixels in [0, 1], `[b, d, t, h, w]`."""
        return self.around(self.patches(video_bcthw).relu())


class VideoFeatures(Condition):
    """Runs the encoder. It gives nothing to the transformer: the loss alone reads it."""

    tensors = frozenset({"tokens"})
    reads_caption = False

    def load(self, device):  # only where entries are missing from the cache
        self.encoder = TinyVideoEncoder().to(device).eval()
        self.encoder.load_state_dict(load_file(self.params.weights, device=str(device)))

    @torch.no_grad()
    def encode(self, sample, encoders):
        pixels = sample.video_tchw.to(encoders.device).float() / 255
        pixels = interpolate(pixels, size=self.params.size, mode="bilinear", antialias=True)
        return {"tokens": self.encoder(pixels.transpose(0, 1)[None])[0].half().cpu()}  # [d, t, h, w]


class RelationHead(Mixin):
    """Hands projected hidden states to the loss."""

    def __init__(self, params, model):
        super().__init__(params, model)
        self.project = nn.Sequential(
            nn.Linear(model.width, model.width), nn.SiLU(), nn.Linear(model.width, params.width)
        )

    def tap(self, hidden_bld, block, forward):
        if block.index == self.params.block:
            forward.outputs[self.name] = self.project(forward.block.video(hidden_bld))  # [b, t, h, w, d]


class TokenRelations(LossTerm):
    """Compares the similarities of all pairs of tokens of a clip."""

    def __call__(self, step):
        target_bdthw = step.encoded[self.params.condition]["tokens"].float()
        own_bdthw = step.outputs[self.params.module].float().movedim(-1, 1)
        own_bdthw = interpolate(own_bdthw, size=target_bdthw.shape[2:], mode="trilinear")
        gap = relations(own_bdthw) - relations(target_bdthw)
        return (gap.abs() - self.params.margin).relu().mean((1, 2))


def relations(tokens_bdthw):
    """Returns the cosine similarity of each two tokens, `[b, l, l]`."""
    tokens_bld = normalize(tokens_bdthw.flatten(2).transpose(1, 2), dim=-1)
    return tokens_bld @ tokens_bld.transpose(1, 2)

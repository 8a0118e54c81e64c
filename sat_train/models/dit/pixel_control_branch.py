"""The branch of TheDenk/cogvideox-controlnet: a second, shallower transformer that reads control pixels."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat_train.config import ModelSpec, NetworkSpec
from sat_train.config.parts.module_parts import PixelControlBranchParams
from sat_train.models.dit.block import DitBlock
from sat_train.models.dit.context import BlockContext, Extras, ForwardContext
from sat_train.models.dit.embedding import PatchEmbed, PatchGrid, timestep_features
from sat_train.models.dit.initialization import initialize_weights, zero_
from sat_train.models.dit.mixin import Mixin
from sat_train.models.dit.sincos import sincos_table
from sat_train.models.dit.stack import BlockStack
from sat_train.models.dit.transformer import DiffusionTransformer

# positions along time, height and width are divided by these, whatever the base's are
INTERPOLATION = (1.0, 1.875, 1.875)


class PixelEncoder(nn.Module):
    """Control pixels to features of the latent's frames and size.

    Twice a 1x1 convolution, a norm of each frame and ReLU, each time with a mean over the pairs, then over
    the rest, of a latent frame's frames.

    Args:
        channels: Colours of the pixels of a latent element, of one frame.
        frames: Frames of a latent frame.
    """

    def __init__(self, channels: int, *, frames: int) -> None:
        super().__init__()
        self.frames, self.out_channels = frames, channels // 4
        self.first = _normed_convolution(channels, channels // 2)
        self.second = _normed_convolution(channels // 2, self.out_channels)

    def forward(self, pixels_btchw: Tensor) -> Tensor:
        """Maps `[b, t, frames * channels, h, w]` to `[b, t, channels / 4, h, w]`."""
        batch = len(pixels_btchw)
        frames_nchw = pixels_btchw.unflatten(2, (self.frames, -1)).flatten(0, 2)
        pairs_nchw = self.first(frames_nchw).unflatten(0, (-1, 2)).mean(dim=1)
        encoded_nchw = self.second(pairs_nchw).unflatten(0, (-1, self.frames // 2)).mean(dim=1)
        encoded_btchw: Tensor = encoded_nchw.unflatten(0, (batch, -1))
        return encoded_btchw


def _normed_convolution(inside: int, outside: int) -> nn.Sequential:
    layers = {"conv": nn.Conv2d(inside, outside, 1), "norm": nn.GroupNorm(2, outside), "relu": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers))


class PixelEmbedding(nn.Module):
    """Tokens and time features of the branch, from weights of its own.

    Args:
        model: Numbers of the base.
        channels: Colours of the pixels of a latent element, of one frame.
        width: Width of the branch.
    """

    def __init__(self, model: NetworkSpec, *, channels: int, width: int) -> None:
        super().__init__()
        self.width, self.latent_channels = width, model.out_channels
        self.encoder = PixelEncoder(channels, frames=model.temporal_compression)
        self.patch_embed = PatchEmbed(
            in_channels=self.latent_channels + self.encoder.out_channels,
            hidden_size=width,
            patch_size=model.patch,
            text_hidden_size=model.text_width,
        )
        self.time_embed = nn.Sequential(
            nn.Linear(width, model.time_width), nn.SiLU(), nn.Linear(model.time_width, model.time_width)
        )
        self._positions: dict[tuple[PatchGrid, torch.device, torch.dtype], Tensor] = {}
        if torch.get_default_device().type != "meta":
            initialize_weights(self, seed=int(torch.randint(2**62, (), device="cpu")), num_layers=1)

    def forward(self, pixels_btchw: Tensor, forward: ForwardContext) -> tuple[Tensor, Tensor]:
        """Returns tokens with their positions, `[b, l, width]`, and time features `[b, e]`.

        Of the base's input the branch sees the noised latent alone, and its text.
        """
        latent_btchw, text_bld = forward.latent_btchw, forward.text_bld
        noised_btchw = latent_btchw[:, :, : self.latent_channels]
        together_btchw = torch.cat([noised_btchw, self.encoder(pixels_btchw)], dim=2)
        hidden_bld = self.patch_embed.word_embedding_forward(together_btchw, text_bld)
        positions = self._table(forward.dit.patch_grid(latent_btchw), hidden_bld)
        hidden_bld = hidden_bld + F.pad(positions, (0, 0, text_bld.shape[1], 0))
        features = timestep_features(forward.timesteps_b, self.width)
        return hidden_bld, self.time_embed(features.to(hidden_bld.dtype))

    @torch.no_grad()
    def copy_from(self, dit: DiffusionTransformer) -> None:
        """Copies the base's embeddings; columns of the control keep their values."""
        base, own = dit.mixins["patch_embed"], self.patch_embed
        columns = self.latent_channels * math.prod(own.patch_size)  # channels are outermost
        own.proj.weight.flatten(1)[:, :columns].copy_(base.proj.weight.flatten(1)[:, :columns])
        own.proj.bias.copy_(base.proj.bias)
        for mine, theirs in ((own.text_proj, base.text_proj), (self.time_embed, dit.time_embed)):
            weights = theirs.state_dict()
            mine.load_state_dict({key: weights[key] for key in mine.state_dict()})

    def _table(self, grid: PatchGrid, like: Tensor) -> Tensor:
        key = (grid, like.device, like.dtype)
        if key not in self._positions:
            table = sincos_table(grid, self.width, interpolation=INTERPOLATION, device=like.device)
            self._positions[key] = table.to(like.dtype)
        return self._positions[key]


class PixelControlBranch(Mixin):
    """Adds the states of its blocks to the video tokens of the base's first blocks.

    With the base's width it begins as copies of the base's embeddings and blocks. Base and branch share the
    rotation of queries and keys, and each has its own positions that are added.

    Args:
        params: Its settings.
        model: Numbers of the base.

    Source: TheDenk/cogvideox-controlnet@e21a4a3 `cogvideo_controlnet.py`, `cogvideo_transformer.py`,
        `training/train_controlnet.py`, except that projections begin at zero, and that columns of the latent
        in the patch embedding are copied too. The widths of the released branches are those of issue 9 there.
    """

    params: PixelControlBranchParams

    def __init__(self, params: PixelControlBranchParams, model: ModelSpec) -> None:
        super().__init__(params, model)
        self.starts_as_base = params.projections
        channels = model.condition_widths[params.condition] // model.temporal_compression
        self.stack = BlockStack(model, layers=params.blocks, heads=params.heads)
        self.embed = PixelEmbedding(model, channels=channels, width=self.stack.width)
        self.per_block = nn.ModuleDict(
            {
                str(block): zero_(nn.Linear(self.stack.width, model.width))
                if params.projections
                else nn.Identity()
                for block in range(params.blocks)
            }
        )

    @property
    def _states(self) -> str:
        return f"{self.name}_states"  # a condition may have the module's name

    def reinit(self, dit: Any = None) -> None:
        """Copies the base's embeddings and first blocks into a branch of its width."""
        if dit is not None and self.stack.width == self.model.width:
            self.stack.copy_from(dit, range(self.params.blocks))
            self.embed.copy_from(dit)

    def before_blocks(self, hidden_bld: Tensor, forward: ForwardContext) -> Extras:
        """Runs the branch; each of the base's first blocks gets the state of its block."""
        own_bld, emb_bd = self.embed(forward.given(self.params.condition), forward)
        context = forward.dit.block_context(emb_bd, forward.latent_btchw, forward.text_bld)
        states: dict[int, Tensor] = self.stack.run(own_bld, forward, context)
        return {self._states: states}

    def after_block(self, x_bld: Tensor, *, part: Any, block: DitBlock, context: BlockContext) -> Tensor:
        """Returns the state of the branch at video tokens, projected."""
        added_bthwd = part(context.video(context.extras[self._states]))
        return context.tokens(self.params.weight * added_bthwd)

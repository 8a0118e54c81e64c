"""The contexts of one forward: a read-only one for its blocks, and one for the hooks between blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sat.model.base_model import BaseModel
from torch import Tensor

from sat_train.models.dit.elementwise import Segments
from sat_train.models.dit.embedding import PatchGrid, to_patches
from sat_train.models.dit.frame_levels import AppendedFrames

# by name; of a mapping by block index each block receives its own tensor
Extras = dict[str, Tensor | dict[int, Tensor]]


class BlockContext(NamedTuple):
    """Inputs of a block other than its tokens. They cannot be changed: a block may run twice (checkpointing).

    Tokens are text, then video, then those of appended frames, then those appended by modules.

    Args:
        emb_bd: Timestep (and `ofs`) features, `[b, e]`. Where frames have levels of their own, `[b, r, e]`:
            the sample's, which text has, then those of every patch of frames in time, also of appended ones.
        rotation_lk2: Cosine and sine of each token's rotary angles, fp32 `[l, k / 2, 2]`; (1, 0) at those
            that are not rotated. None: no rotary positions.
        grid: Patches of the video.
        text_length: Text tokens.
        appended: Tokens behind the video.
        extras: Named tensors of conditions and modules, batch first: those of all blocks and this block's.
    """

    emb_bd: Tensor
    rotation_lk2: Tensor | None
    grid: PatchGrid
    text_length: int
    appended: int = 0
    extras: Mapping[str, Tensor] = MappingProxyType({})

    def video(self, x_bld: Tensor) -> Tensor:
        """Returns the video tokens alone, without appended frames, `[b, l, d]` to `[b, t, h, w, d]`."""
        video_bld = x_bld[:, self.text_length : self.text_length + self.grid.tokens]
        video_bthwd: Tensor = video_bld.unflatten(1, self.grid)
        return video_bthwd

    def tokens(self, video_bthwd: Tensor) -> Tensor:
        """Returns video tokens at their positions among all tokens, `[b, l, d]`; the others are zero."""
        return F.pad(video_bthwd.flatten(1, 3), (0, 0, self.text_length, self.appended))

    @property
    def segments(self) -> Segments:
        """The tokens that share a modulation."""
        if self.emb_bd.dim() == 2:
            return Segments(self.text_length)
        area = self.grid.height * self.grid.width
        return Segments(self.text_length, self.emb_bd.shape[1] - 1, area)

    @property
    def video_features(self) -> Tensor:
        """Time features of the video, `[b, e]`, or of each of its patches in time, `[b, grid.frames, e]`."""
        return self.emb_bd if self.emb_bd.dim() == 2 else self.emb_bd[:, 1 : 1 + self.grid.frames]

    def with_tokens(self, count: int) -> BlockContext:
        """Returns the context of a sequence with more tokens at its end; these are not rotated."""
        rotation_lk2 = self.rotation_lk2
        if rotation_lk2 is not None:
            none = rotation_lk2.new_tensor([1.0, 0.0]).expand(count, *rotation_lk2.shape[1:])
            rotation_lk2 = torch.cat([rotation_lk2, none])
        return self._replace(rotation_lk2=rotation_lk2, appended=self.appended + count)

    def for_block(self, index: int, extras: Extras) -> BlockContext:
        """Returns the context of one block, which sees the extras of all blocks and its own."""
        if not extras:
            return self
        dealt = {
            name: value[index] if isinstance(value, dict) else value
            for name, value in extras.items()
            if not isinstance(value, dict) or index in value
        }
        return self._replace(extras=MappingProxyType(dealt))


def cast_extras(extras: Mapping[str, Tensor], latent_btchw: Tensor) -> Extras:
    """Casts the tensors of conditions to the device and dtype of a latent.

    Whole numbers stay, and so do tensors whose name ends in `_fp32`: pixel coordinates do not survive half
    precision.
    """
    for name, value in extras.items():
        assert len(value) == len(latent_btchw), f"extras {name}: {len(value)} rows, another batch"
    return {
        name: value.to(latent_btchw) if value.is_floating_point() and not name.endswith("_fp32") else value
        for name, value in extras.items()
    }


@dataclass
class ForwardContext:
    """One forward for the hooks between blocks. They may store values: nothing here is computed twice.

    Args:
        dit: The `DiffusionTransformer`.
        latent_btchw: All channels that are embedded: the noised latent and those next to it. Appended frames
            are not in it.
        text_bld: Text embeddings, `[b, l, text_hidden_size]`.
        timesteps_b: The samples' timesteps, `[b]`.
        ofs_b: `ofs` values, `[b]`; None for models without.
        levels_bt: Timesteps of latent frames, `[b, t]`, -1 where clean; None: they have the sample's.
        appended: Frames that are appended in time.
        extras: Named tensors of the conditions; those of `before_blocks` join them.
        outputs: Tensors that hooks return to the loss, by name.
    """

    dit: BaseModel
    latent_btchw: Tensor
    text_bld: Tensor
    timesteps_b: Tensor
    ofs_b: Tensor | None
    levels_bt: Tensor | None
    appended: AppendedFrames | None
    extras: Extras
    outputs: dict[str, Tensor] = field(default_factory=dict)
    block_context: BlockContext | None = None

    @property
    def block(self) -> BlockContext:
        """Context of all blocks, without extras; available after the time features."""
        assert self.block_context is not None, "the time features come before the blocks"
        return self.block_context

    @property
    def training(self) -> bool:
        """True in training mode."""
        return bool(self.dit.training)

    def given(self, name: str) -> Tensor:
        """Returns the tensor that a condition gives modules under its name."""
        value = self.extras.get(name)
        names = ", ".join(self.extras) or "nothing"
        assert isinstance(value, Tensor), f"conditions give {names}, and no tensor {name} (into: extras)"
        return value

    def patches(self, latent_btchw: Tensor) -> Tensor:
        """Cuts a latent of any channels into patches, `[b, t, h, w, channels * patch volume]`."""
        return to_patches(latent_btchw, self.dit.spec.patch)

    def embed(
        self, latent_btchw: Tensor, text_bld: Tensor, timesteps_b: Tensor
    ) -> tuple[Tensor, BlockContext]:
        """Embeds another sequence as the base does, without any module.

        Returns:
            Tokens `[b, l, d]` and their context.
        """
        emb_bd = self.dit.time_features(timesteps_b, self.ofs_b)
        return self.dit.embed(latent_btchw, text_bld), self.dit.block_context(emb_bd, latent_btchw, text_bld)

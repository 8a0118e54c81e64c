"""One block, in order: modulate, project, normalise q and k, rotate, attend, project, gate; the MLP likewise.

Each step is a function of the signature that SAT's hook of that name has, so a module's wrapper of a step has
the form of the step itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sat.model.base_model import BaseMixin
from sat.model.transformer import BaseTransformerLayer
from sat.mpu import copy_to_model_parallel_region, get_model_parallel_world_size
from torch import Tensor, nn

from sat_train.config.parts.record import Recompute
from sat_train.models.dit.context import BlockContext
from sat_train.models.dit.elementwise import gated_sum, rotate_pairs

# modules that act at one hook of one block, outermost first, each with its part in that block
Acting = tuple[tuple[BaseMixin, nn.Module | None], ...]


@dataclass(eq=False, repr=False)
class DitBlock:
    """One block of the transformer: the unit of compilation and of activation checkpointing.

    It refers to modules that SAT's layer and `AdaLNLayer` own, so weights keep SAT's keys. It holds no state:
    the same input and context give the same output, however often it runs.

    Args:
        index: Position in the stack. A hook that reads it inside a block is compiled once for each block.
        layer: SAT's layer: norms, attention and MLP.
        modulation: Time features to the shift, scale and gate of attention and MLP, for video and for text.
        query_norm: Normalises queries over the width of a head; None: no norm.
        key_norm: Normalises keys.
        head_dim: Width of a head.
        acting: By hook, the modules that act in this block with their parts, outermost first.
    """

    index: int
    layer: BaseTransformerLayer
    modulation: nn.Module
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    head_dim: int
    acting: Mapping[str, Acting]

    @property
    def recompute(self) -> Recompute | None:
        """Policy of its backward, where it is not the model's: an attribute of the layer.

        Blocks are made again when hooks change, layers are not.
        """
        policy: Recompute | None = getattr(self.layer, "recompute", None)
        return policy

    def __call__(self, x_bld: Tensor, context: BlockContext) -> Tensor:
        """Maps tokens `[b, l, d]` to `[b, l, d]`: the block, plus the additions of modules to its output."""
        x_bld = self.run(layer_forward, x_bld, context=context)
        added = (
            mixin.after_block(x_bld, part=part, block=self, context=context)
            for mixin, part in self.acting.get("after_block", ())
        )
        return sum(added, x_bld)

    def run(self, step: Callable[..., Tensor], *tensors: Tensor, context: BlockContext) -> Tensor:
        """Runs one step of the block inside the modules that wrap it."""
        hook = step.__name__
        for mixin, part in reversed(self.acting.get(hook, ())):
            step = functools.partial(getattr(mixin, hook), part=part, old_impl=step)
        return step(*tensors, block=self, context=context)

    def modules(self) -> dict[str, nn.Module]:
        """Returns the modules that hold the block's weights."""
        modules = {
            "layer": self.layer,
            "modulation": self.modulation,
            "query_norm": self.query_norm,
            "key_norm": self.key_norm,
        }
        return {name: module for name, module in modules.items() if module is not None}

    def modulate(self, context: BlockContext) -> tuple[Tensor, ...]:
        """Returns shift, scale, gate of attention, then of the MLP, of each segment: six of `[b, s, d]`."""
        features = context.emb_bd
        video_text = self.modulation(features).unflatten(-1, (2, 6, -1))  # [b, 2, 6, d], or [b, r, 2, 6, d]
        if features.dim() == 2:
            modulations: tuple[Tensor, ...] = video_text.flip(1).unbind(2)
            return modulations
        of_text, of_frames, of_rest = video_text[:, :1, 1], video_text[:, 1:, 0], video_text[:, :1, 0]
        return torch.cat([of_text, of_frames, of_rest], dim=1).unbind(2)


def layer_forward(x_bld: Tensor, *, block: DitBlock, context: BlockContext) -> Tensor:
    """SAT hook: one block, `[b, l, d]` to `[b, l, d]`.

    One LayerNorm runs over text and video together, which differ in their modulation alone.

    Source: zai-org/CogVideo@7a1af71 `sat/dit_video_concat.py` `AdaLNMixin.layer_forward`.
    """
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.modulate(context)
    layer, segments = block.layer, context.segments
    modulated = layer.input_layernorm(x_bld, shift_a, scale_a, segments)
    attended = block.run(attention_forward, modulated, context=context)
    x_bld = gated_sum(x_bld, attended, gate_a, segments)
    modulated = layer.post_attention_layernorm(x_bld, shift_m, scale_m, segments)
    return gated_sum(x_bld, block.run(mlp_forward, modulated, context=context), gate_m, segments)


def attention_forward(x_bld: Tensor, *, block: DitBlock, context: BlockContext) -> Tensor:
    """SAT hook: modulated tokens `[b, l, d]` to the output of attention, before its gate."""
    attention = block.layer.attention
    qkv = attention.query_key_value(x_bld).unflatten(-1, (3, -1, block.head_dim))
    query, key, value = qkv.unbind(2)
    if block.query_norm is not None and block.key_norm is not None:
        query, key = block.query_norm(query), block.key_norm(key)
    if context.rotation_lk2 is not None:
        query, key = (rotate_pairs(part, context.rotation_lk2) for part in (query, key))
    heads = (part.transpose(1, 2) for part in (query, key, value))
    y_bnlk = block.run(attention_fn, *heads, context=context)
    y_bld: Tensor = attention.dense(y_bnlk.transpose(1, 2).flatten(2))
    return y_bld


def attention_fn(
    query: Tensor, key: Tensor, value: Tensor, *, block: DitBlock, context: BlockContext
) -> Tensor:
    """SAT hook: attention of all tokens to all tokens, `[b, n, l, k]`; q and k are normalised and rotated."""
    return F.scaled_dot_product_attention(query, key, value)


def mlp_forward(x_bld: Tensor, *, block: DitBlock, context: BlockContext) -> Tensor:
    """SAT hook: modulated tokens `[b, l, d]` to the output of the MLP, before its gate."""
    mlp = block.layer.mlp
    y_bld: Tensor = mlp.dense_4h_to_h(F.gelu(mlp.dense_h_to_4h(x_bld), approximate="tanh"))
    return y_bld


class HeadLayerNorm(nn.LayerNorm):
    """LayerNorm over the width of a head, whose weights are shared by all heads.

    A tensor-parallel rank sees its own heads only, so it holds a part of the gradient of these shared
    weights; the parts are summed over the model axis, and all ranks take the same step.
    """

    def forward(self, x_blnk: Tensor) -> Tensor:
        """Normalises the last dim."""
        if self.weight is None or get_model_parallel_world_size() == 1:
            return super().forward(x_blnk)
        weight, bias = (copy_to_model_parallel_region(shared) for shared in (self.weight, self.bias))
        return F.layer_norm(x_blnk, self.normalized_shape, weight, bias, self.eps)


class AdaLNLayer(BaseMixin):
    """Weights of the blocks besides SAT's layers: their modulation, and the norms of queries and keys.

    Args:
        num_layers: Blocks.
        hidden_size: Model width.
        head_dim: Width of a head.
        time_embed_dim: Width of the time features.
        qk_norm: Normalise queries and keys over the width of a head.
        elementwise_affine: LayerNorms have weights.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        head_dim: int,
        time_embed_dim: int,
        qk_norm: bool,
        elementwise_affine: bool,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.adaLN_modulations = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, 12 * hidden_size)) for _ in range(num_layers)
        )
        self.query_layernorm_list = self.key_layernorm_list = None
        if qk_norm:
            self.query_layernorm_list, self.key_layernorm_list = (
                nn.ModuleList(
                    HeadLayerNorm(head_dim, eps=1e-6, elementwise_affine=elementwise_affine)
                    for _ in range(num_layers)
                )
                for _ in range(2)
            )

    def blocks(
        self, layers: Iterable[BaseTransformerLayer], *, acting: Sequence[Mapping[str, Acting]]
    ) -> tuple[DitBlock, ...]:
        """Returns the blocks that combine SAT's layers with the modules here.

        Args:
            layers: SAT's layers.
            acting: For each layer, by hook, the modules that act there.
        """
        none = [None] * len(acting)
        query_norms, key_norms = self.query_layernorm_list or none, self.key_layernorm_list or none
        owned = zip(layers, self.adaLN_modulations, query_norms, key_norms, acting, strict=True)
        return tuple(
            DitBlock(index, layer, modulation, query_norm, key_norm, self.head_dim, hooks)
            for index, (layer, modulation, query_norm, key_norm, hooks) in enumerate(owned)
        )

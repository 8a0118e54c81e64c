"""One block: attention and MLP over text and video together, each modulated by the timestep."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sat.model.base_model import BaseMixin, non_conflict
from sat.mpu import copy_to_model_parallel_region, get_model_parallel_world_size
from torch import Tensor, nn

from sat_train.models.dit.grid import Block, BlockContext


class HeadLayerNorm(nn.LayerNorm):
    """LayerNorm over the width of a head, whose weights are shared by all heads.

    A tensor-parallel rank sees its own heads only, so it holds a part of the gradient of these shared
    weights; the parts are summed over the model axis, and all ranks take the same step.
    """

    def forward(self, x_bnlk: Tensor) -> Tensor:
        """Normalises the last dim."""
        if self.weight is None or get_model_parallel_world_size() == 1:
            return super().forward(x_bnlk)
        weight, bias = (copy_to_model_parallel_region(shared) for shared in (self.weight, self.bias))
        return F.layer_norm(x_bnlk, self.normalized_shape, weight, bias, self.eps)


class AdaLNLayer(BaseMixin):
    """The block: what the timestep modulates, and the order of things.

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

    def blocks(self) -> Iterator[Block]:
        """Yields the modules of each layer."""
        for index, layer in enumerate(self.transformer.layers):
            norms = (
                self.query_layernorm_list and self.query_layernorm_list[index],
                self.key_layernorm_list and self.key_layernorm_list[index],
            )
            yield Block(layer, self.adaLN_modulations[index], *norms)

    def layer_forward(self, hidden_bld: Tensor, block: Block, context: BlockContext) -> Tensor:
        """SAT hook: one block, `[b, l, d]` to `[b, l, d]`.

        One LayerNorm runs over text and video together and `where` picks each token's modulation, so a
        compiler fuses norm, modulation and residual into one pass.

        Source: zai-org/CogVideo@7a1af71 `sat/dit_video_concat.py` `AdaLNMixin.layer_forward`.
        """
        layer = block.layer
        video_b6d, text_b6d = block.modulation(context.emb_bd).unflatten(1, (2, 6, -1)).unbind(1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            torch.where(context.is_text_l1, text[:, None], video[:, None])
            for video, text in zip(video_b6d.unbind(1), text_b6d.unbind(1), strict=True)
        )
        attended = self._attend(layer.input_layernorm(hidden_bld) * (1 + scale_a) + shift_a, block, context)
        hidden_bld = hidden_bld + gate_a * attended
        mlp = self.transformer.hooks["mlp_forward"]
        normed = layer.post_attention_layernorm(hidden_bld) * (1 + scale_m) + shift_m
        mlp_bld: Tensor = mlp(normed, block=block)
        return hidden_bld + gate_m * mlp_bld

    def _attend(self, x_bld: Tensor, block: Block, context: BlockContext) -> Tensor:
        attention = block.layer.attention
        qkv = attention.query_key_value(x_bld).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attend = self.transformer.hooks["attention_fn"]
        y_bnlk = attend(query, key, value, block=block, context=context)
        y_bld: Tensor = attention.dense(y_bnlk.transpose(1, 2).flatten(2))
        return y_bld

    @non_conflict  # type: ignore[untyped-decorator]  # SAT has no types
    def attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        block: Block,
        context: BlockContext,
        old_impl: Callable[..., Tensor],
    ) -> Tensor:
        """SAT hook: normalises queries and keys, then continues to rotation and attention."""
        if block.query_norm is not None and block.key_norm is not None:
            query, key = block.query_norm(query), block.key_norm(key)
        return old_impl(query, key, value, block=block, context=context)

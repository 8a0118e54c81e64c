"""The encoder stack of T5 v1.1: pre-norm blocks without biases, with one table of relative positions.

Modules have the names of the released files. transformers computes the same bits in fp32 and bf16, but its
import alone takes longer than the rest of a start.

Source: Raffel et al. 2020 (arXiv:1910.10683); huggingface/transformers@v5 `models/t5/modeling_t5.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class T5Settings:
    """The keys of a T5's config.json that its encoder depends on, with their defaults there."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    feed_forward_proj: str = "relu"
    layer_norm_epsilon: float = 1e-6
    pad_token_id: int = 0
    eos_token_id: int = 1


# google/t5-v1_1-xxl
T5_XXL = T5Settings(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")


def _tanh_gelu(x: Tensor) -> Tensor:
    """GELU as T5 v1.1 was trained with it, operation by operation: the fused kernel rounds differently."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gated-gelu": _tanh_gelu,
    "gated-silu": F.silu,
}


class T5Encoder(nn.Module):
    """Token ids to embeddings.

    Args:
        settings: Sizes and activation.
    """

    def __init__(self, settings: T5Settings) -> None:
        super().__init__()
        self.shared = _table(settings.vocab_size, settings.d_model)
        self.encoder = _Stack(settings)

    def forward(self, ids_bl: Tensor) -> Tensor:
        """Returns `[b, l, d_model]`; every position attends to every other, padding included."""
        text_bld: Tensor = self.encoder(self.shared(ids_bl))
        return text_bld


def _table(rows: int, width: int) -> nn.Embedding:
    """Returns a table without values: drawing them on the meta device would import the compiler."""
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.empty(rows, width))
    return table


class _Stack(nn.Module):
    def __init__(self, settings: T5Settings) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(settings, has_table=i == 0) for i in range(settings.num_layers))
        self.final_layer_norm = _Norm(settings)

    def forward(self, x_bld: Tensor) -> Tensor:
        first: Any = self.block[0]
        bias_1nll: Tensor = first.layer[0].SelfAttention.position_bias(x_bld.shape[1])
        for block in self.block:
            x_bld = block(x_bld, bias_1nll)
        normed_bld: Tensor = self.final_layer_norm(x_bld)
        return normed_bld


class _Block(nn.Module):
    def __init__(self, settings: T5Settings, *, has_table: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_AttentionLayer(settings, has_table=has_table), _MlpLayer(settings)])

    def forward(self, x_bld: Tensor, bias_1nll: Tensor) -> Tensor:
        attention, mlp = self.layer
        x_bld = x_bld + attention(x_bld, bias_1nll)
        y_bld: Tensor = x_bld + mlp(x_bld)
        return y_bld


class _AttentionLayer(nn.Module):
    def __init__(self, settings: T5Settings, *, has_table: bool) -> None:
        super().__init__()
        self.SelfAttention = _Attention(settings, has_table=has_table)
        self.layer_norm = _Norm(settings)

    def forward(self, x_bld: Tensor, bias_1nll: Tensor) -> Tensor:
        y_bld: Tensor = self.SelfAttention(self.layer_norm(x_bld), bias_1nll)
        return y_bld


class _MlpLayer(nn.Module):
    def __init__(self, settings: T5Settings) -> None:
        super().__init__()
        self.DenseReluDense = _Mlp(settings)
        self.layer_norm = _Norm(settings)

    def forward(self, x_bld: Tensor) -> Tensor:
        y_bld: Tensor = self.DenseReluDense(self.layer_norm(x_bld))
        return y_bld


class _Attention(nn.Module):
    """Attention without scale; its scores get a bias by the distance of two tokens."""

    def __init__(self, settings: T5Settings, *, has_table: bool) -> None:
        super().__init__()
        inner = settings.num_heads * settings.d_kv
        self.head_width = settings.d_kv
        self.max_distance = settings.relative_attention_max_distance
        self.q, self.k, self.v = (nn.Linear(settings.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, settings.d_model, bias=False)
        if has_table:
            buckets = settings.relative_attention_num_buckets
            self.relative_attention_bias = _table(buckets, settings.num_heads)

    def position_bias(self, length: int) -> Tensor:
        """Returns the bias of the scores of all layers, `[1, n, l, l]`; the first layer has the table."""
        table = self.relative_attention_bias
        place_l = torch.arange(length, device=table.weight.device)
        buckets = distance_buckets(
            place_l[None] - place_l[:, None], count=table.num_embeddings, max_distance=self.max_distance
        )
        bias: Tensor = table(buckets).permute(2, 0, 1)[None].contiguous()
        return bias

    def forward(self, x_bld: Tensor, bias_1nll: Tensor) -> Tensor:
        query, key, value = (
            project(x_bld).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        y_bnlk = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_1nll, scale=1.0)
        y_bld: Tensor = self.o(y_bnlk.transpose(1, 2).flatten(2))
        return y_bld


def distance_buckets(distance: Tensor, *, count: int, max_distance: int) -> Tensor:
    """Returns the bucket of each signed distance: half for each sign, of these half for short distances, one
    each, and the rest in logarithmic steps up to `max_distance`.
    """
    half = count // 2
    exact = half // 2
    far = distance.abs()
    steps = torch.log(far.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    bucket = torch.where(far < exact, far, (exact + steps.long()).clamp(max=half - 1))
    return bucket + half * (distance > 0)


class _Mlp(nn.Module):
    def __init__(self, settings: T5Settings) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[settings.feed_forward_proj]
        is_gated = settings.feed_forward_proj.startswith("gated")
        self._inner = ("wi_0", "wi_1") if is_gated else ("wi",)
        for name in self._inner:
            self.add_module(name, nn.Linear(settings.d_model, settings.d_ff, bias=False))
        self.wo = nn.Linear(settings.d_ff, settings.d_model, bias=False)

    def forward(self, x_bld: Tensor) -> Tensor:
        inner, *gate = (self.get_submodule(name)(x_bld) for name in self._inner)
        y_bld: Tensor = self.wo(math.prod(gate, start=self.activation(inner)))
        return y_bld


class _Norm(nn.Module):
    """Root-mean-square norm, its mean in fp32."""

    def __init__(self, settings: T5Settings) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(settings.d_model))
        self.eps = settings.layer_norm_epsilon

    def forward(self, x_bld: Tensor) -> Tensor:
        mean_square = x_bld.float().square().mean(-1, keepdim=True)
        return self.weight * (x_bld * torch.rsqrt(mean_square + self.eps)).to(self.weight.dtype)

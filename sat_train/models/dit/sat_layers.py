"""SAT's layers, built directly on a device and in a dtype."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from sat.model.transformer import BaseTransformer
from sat.mpu import (
    ColumnParallelLinear,
    RowParallelLinear,
    get_model_parallel_group,
    get_model_parallel_world_size,
    mappings,
)
from torch import Tensor, nn

from sat_train.models.dit.elementwise import ModulatedLayerNorm

# the values of SAT's transformer for its layers, and of diffusers for all
NORM_EPS = 1e-5
LINEAR = (nn.Linear, ColumnParallelLinear, RowParallelLinear)  # classes of linear layers


def _sum_over_ranks(x: Tensor) -> Tensor:
    """Sums over the ranks of a model, into a new tensor."""
    if get_model_parallel_world_size() == 1:
        return x
    summed = x.clone()
    torch.distributed.all_reduce(summed, group=get_model_parallel_group())
    return summed


# SAT's own writes into its input. The output of a matrix product that a block keeps for its backward would be
# summed a second time, when the block runs again.
mappings._reduce = _sum_over_ranks


def build_layers(
    num_layers: int, hidden_size: int, num_attention_heads: int, elementwise_affine: bool
) -> BaseTransformer:
    """Builds SAT's transformer without the word and position embeddings, which video does not use.

    SAT builds it on the CPU unless told otherwise; its linear layers ignore torch's default device and dtype.
    """
    transformer = BaseTransformer(
        num_layers=num_layers,
        vocab_size=1,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        max_sequence_length=1,
        layernorm_epsilon=NORM_EPS,
        layernorm=functools.partial(ModulatedLayerNorm, elementwise_affine=elementwise_affine),
        skip_init=True,
        params_dtype=torch.get_default_dtype(),
        device=torch.get_default_device(),
    )
    del transformer.word_embeddings, transformer.position_embeddings
    return transformer


@contextlib.contextmanager
def building(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Creates parameters on a device and in a dtype, and restores the global generators."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            yield
    finally:
        torch.set_default_dtype(before)

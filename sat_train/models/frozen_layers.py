"""Linear layers whose frozen weight is held in few bits, or in host memory, instead of as a parameter.

The weight exists in the dtype of computation while its layer computes: the product keeps neither its input
nor the weight, and its backward makes the weight again. Weights in another form are no part of the state
dict: checkpoints name the base that they come from.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from sat.mpu import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_model_parallel_region,
    get_model_parallel_world_size,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from sat_train.config.parts.record import Quantization
from sat_train.models.block_swap import BlockSwap, swapped_blocks
from sat_train.models.dit.block import DitBlock
from sat_train.models.dit.sat_layers import LINEAR
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.quantization import dequantize, quantize


class HeldWeight(nn.Module):
    """The tensors that a weight is computed from, on the device.

    Args:
        tensors: The weight, or its codes and scales.
    """

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        for index, tensor in enumerate(tensors):
            self.register_buffer(str(index), tensor, persistent=False)

    def tensors(self) -> list[Tensor]:
        """Returns the tensors."""
        return list(self.buffers())

    def weight(self) -> Tensor:
        """Returns the weight, `[out, in]`."""
        return _decoded(self.tensors())

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns `x W^T + b`."""
        return cast(Tensor, _Product.apply(x, bias, *self.tensors()))


class SwappedWeight(HeldWeight):
    """The tensors of a weight in host memory.

    Args:
        swap: Holds the blocks.
        block: Index of the block.
        begin: Number of the block's tensors before those of this weight.
        count: Number of its tensors.
    """

    def __init__(self, swap: BlockSwap, block: int, *, begin: int, count: int) -> None:
        super().__init__()
        self.swap, self._block, self._own = swap, block, slice(begin, begin + count)

    def tensors(self) -> list[Tensor]:
        """Returns the tensors, once their block is on the device."""
        return self.swap.tensors(self._block)[self._own]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns `x W^T + b`."""
        return cast(Tensor, _SwappedProduct.apply(x, bias, self))


class _Product(torch.autograd.Function):
    """`x W^T + b` with a weight that is made twice and kept never, of the tensors that are arguments.

    A module as argument would be a constant of the graph that compiled blocks share.
    """

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
        return F.linear(x, _decoded(tensors), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # inside a checkpoint they can be asked for once
        return grads[0] @ _decoded(tensors), None, *[None] * len(tensors)


class _SwappedProduct(torch.autograd.Function):
    """The same; by the time of the backward the block has to be fetched again."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, held: SwappedWeight) -> Tensor:
        return F.linear(x, held.weight(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.held = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ ctx.held.weight(), None, None


def _decoded(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else dequantize(*tensors)


class FrozenLayer(nn.Module):
    """A linear layer that holds its weight as a `HeldWeight`."""

    plain_class: type[nn.Module]
    held: HeldWeight
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The weight in the dtype of computation; made again where it is held in few bits."""
        return self.held.weight()

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer as SAT's layers of its kind do."""
        if isinstance(self, ColumnParallelLinear):
            x = copy_to_model_parallel_region(x)
        if not isinstance(self, RowParallelLinear):
            return self.held.product(x, self.bias)
        is_last = self.final_bias or self.bias is None
        bias = None if is_last else self.bias / get_model_parallel_world_size()
        y: Tensor = reduce_from_model_parallel_region(self.held.product(x, bias))
        return y + self.bias if is_last and self.bias is not None else y


@functools.cache
def _frozen_class(plain: Any) -> Any:
    """Returns the class of a layer, adapted or not, that is to hold its weight otherwise."""
    *outer, linear = (plain,) if plain in LINEAR else plain.__bases__
    return type(f"Frozen{plain.__name__}", (*outer, FrozenLayer, linear), {"plain_class": plain})


@torch.no_grad()
def hold_frozen_weights(
    dit: DiffusionTransformer,
    *,
    device: torch.device,
    quantization: Quantization = "off",
    swapped: int = 0,
) -> BlockSwap:
    """Changes how the frozen linear layers of the blocks hold their weights; one layer at a time.

    Weights of added modules stay as they are.

    Args:
        dit: The transformer with its weights and adapters, on any device; what trains has been selected.
        device: Where the blocks will compute; weights that do not move to host memory go there.
        quantization: int8 or nf4; off: as they are.
        swapped: Number of blocks whose weights move to host memory.

    Returns:
        The blocks in host memory; empty where none are.
    """
    swap = BlockSwap(device)
    moved = swapped_blocks(swapped, len(dit.blocks)) if swapped else frozenset()
    for block in dit.blocks:
        if quantization == "off" and block.index not in moved:
            continue
        layers = list(_frozen_linears(block))
        tensors = [_encoded(layer, quantization, device) for layer in layers]
        if block.index in moved:
            swap.add(block.index, [tensor for each in tensors for tensor in each])
        begin = 0
        for layer, own in zip(layers, tensors, strict=True):
            place = SwappedWeight(swap, block.index, begin=begin, count=len(own))
            _hold(layer, place if block.index in moved else HeldWeight(*own))
            begin += len(own)
    return swap


def _frozen_linears(block: DitBlock) -> Iterator[nn.Module]:
    for module in block.modules().values():
        for layer in module.modules():
            own = layer.parameters(recurse=False)
            if isinstance(layer, LINEAR) and not any(parameter.requires_grad for parameter in own):
                yield layer


def _encoded(layer: nn.Module, quantization: Quantization, device: torch.device) -> tuple[Tensor, ...]:
    weight = cast(Tensor, layer.weight).detach().to(device)
    return (weight,) if quantization == "off" else quantize(weight, quantization)


def _hold(layer: nn.Module, held: HeldWeight) -> None:
    del layer._parameters["weight"]
    cast(Any, layer).__class__ = _frozen_class(cast(Any, type(layer)))
    layer.add_module("held", held)


@torch.no_grad()
def make_plain(layer: nn.Module) -> None:
    """Turns a layer's weight back into a parameter, where it is held otherwise."""
    if isinstance(layer, FrozenLayer):
        weight = layer.weight.clone()
        del layer.held
        cast(Any, layer).__class__ = layer.plain_class
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

"""Counts a step at the model's own size on the meta device, where nothing is allocated.

Every tensor that our own code makes is counted while it lives. Attention counts as a flash kernel's does.
Not counted: workspaces of libraries, fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sat_train.config import RunConfig
from sat_train.models.encoders import captions_at_once
from sat_train.models.meta_models import (
    build_meta_dit,
    build_meta_inputs,
    build_meta_latent,
    build_meta_text_encoder,
    build_meta_vae,
    counts_modules,
)
from sat_train.models.meters import FlopMeter, LivingTensors, Traffic, flash_attention
from sat_train.models.recomputation import (
    blocks_differ,
    chosen_costs,
    saved_by_compiling,
    set_recomputation,
    without_recomputation,
)

# blocks of the two models that are counted; all blocks keep and take the same, so the rest is a line
_DEPTHS = (2, 4)


@dataclass(frozen=True)
class Work:
    """Work of one rank in a forward and backward pass, or in another run of a network.

    Args:
        moved_bytes: Read and written by elementwise operations.
        linear_flops: Of matrix products and convolutions; a multiply-add is two.
        attention_flops: Of attention's forward, what is recomputed included.
        attention_backward_flops: Of its backward, in which a flash kernel computes the scores again.
        summed_bytes: Of tensors that are summed over the ranks of a model.
    """

    moved_bytes: float
    linear_flops: float
    attention_flops: float
    attention_backward_flops: float
    summed_bytes: float = 0.0

    @property
    def flops(self) -> float:
        """All of them."""
        return self.linear_flops + self.attention_flops + self.attention_backward_flops


def count_peak(config: RunConfig, *, batch_size: int, training: bool = True, compiled: bool = False) -> float:
    """Returns the bytes that a forward and backward pass takes, without weights and their gradients.

    Args:
        config: Model, size of the clips and what is recomputed.
        batch_size: Samples.
        training: Off: a forward pass without gradients.
        compiled: Blocks are compiled, and keep less where they recompute nothing; what one of them takes
            besides counts as an eager one's.
    """

    def peak(layers: int) -> list[float]:
        return [_peak(*_pass(config, batch_size, layers, training, compiled))]

    if not training:
        return _extrapolated(config, peak)[0]
    [most] = peak(config.spec.layers) if blocks_differ(config) else _extrapolated(config, peak)
    less = saved_by_compiling(config) if compiled else []
    # the block whose backward runs has what an eager one keeps
    return most - sum(less[1:]) * batch_size / config.args.batch_size


def count_work(config: RunConfig, *, batch_size: int, training: bool = True, compiled: bool = False) -> Work:
    """Returns the work of a forward and backward pass of eager blocks; see `count_peak`."""
    if training and blocks_differ(config):
        plain = count_work(without_recomputation(config), batch_size=batch_size)
        costs, samples = chosen_costs(config, compiled=compiled), batch_size / config.args.batch_size
        return Work(
            moved_bytes=plain.moved_bytes + samples * sum(cost.moved for cost in costs),
            linear_flops=plain.linear_flops + samples * sum(cost.linear for cost in costs),
            attention_flops=plain.attention_flops + samples * sum(cost.attention for cost in costs),
            attention_backward_flops=plain.attention_backward_flops,
            summed_bytes=plain.summed_bytes + samples * sum(cost.summed for cost in costs),
        )
    return Work(
        *_extrapolated(config, lambda layers: astuple(_work(_pass(config, batch_size, layers, training)[1])))
    )


def _extrapolated(config: RunConfig, count: Callable[[int], Sequence[float]]) -> list[float]:
    """Returns counts at the model's depth: of all blocks, or on a line through two models of fewer.

    Modules act in some blocks only, so these are counted as they are.
    """
    layers = config.spec.layers
    if counts_modules(config):
        return list(count(layers))
    low, high = (count(depth) for depth in _DEPTHS)
    steps = (layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
    return [a + (b - a) * steps for a, b in zip(low, high, strict=True)]


def _pass(
    config: RunConfig, batch_size: int, layers: int, training: bool, compiled: bool = False
) -> tuple[nn.Module, Callable[[], Any]]:
    """Returns a transformer of a few layers, and its pass."""
    dit = build_meta_dit(config, layers=layers).train(training)
    if training:
        set_recomputation(dit, config, compiled=compiled)
    inputs = build_meta_inputs(config, batch_size)
    for parameter in dit.parameters():
        if parameter.requires_grad:  # its gradient is counted with the states
            parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def run() -> None:
        with torch.set_grad_enabled(training):
            loss = dit(**inputs).float().square().mean()
        if training:
            loss.backward()

    return dit, run


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _peak(module: nn.Module, run: Callable[[], Any]) -> int:
    living = LivingTensors(module)
    with flash_attention(), living:
        run()
    return living.peak


def _work(run: Callable[[], Any]) -> Work:
    traffic, flops = Traffic(), FlopMeter()
    with flash_attention(), flops, traffic:
        run()
    attention = {name: count for name, count in flops.by_operation.items() if "attention" in name}
    backward = sum(count for name, count in attention.items() if "backward" in name)
    linear = flops.total - sum(attention.values())
    return Work(traffic.moved, linear, sum(attention.values()) - backward, backward, traffic.summed)


def peak_of_encoding(config: RunConfig) -> float:
    """Returns the bytes that the autoencoder's encoding of one clip takes."""
    return _peak(*_encoding(config))


def work_of_encoding(config: RunConfig) -> Work:
    """Returns the work of the autoencoder's encoding of one clip."""
    return _work(_encoding(config)[1])


def peak_of_captions(config: RunConfig) -> float:
    """Returns the bytes that T5 takes for the captions that precompute gives it together on a GPU."""
    count = captions_at_once(config.require_data().captions_at_once, on_gpu=True)
    ids = torch.empty(count, config.spec.text.max_length, dtype=torch.int64, device="meta")
    encoder = build_meta_text_encoder(config)
    return _peak(encoder, partial(encoder, ids))


def peak_of_decoding(config: RunConfig) -> float:
    """Returns the bytes that the autoencoder's decoding of one video takes."""
    vae = build_meta_vae(config)
    return _peak(vae, partial(vae.decode, build_meta_latent(config, 1, vae.z_channels), vae.sample_tiling))


def _encoding(config: RunConfig) -> tuple[nn.Module, Callable[[], Any]]:
    vae, data = build_meta_vae(config), config.require_data().params
    clip = torch.empty(1, data.max_num_frames, 3, *data.video_size, device="meta")
    return vae, partial(vae.encode_moments, clip)

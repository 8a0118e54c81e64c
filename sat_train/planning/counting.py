"""Counts a step at the model's own size on the meta device, where nothing is allocated.

Every tensor that our own code makes is counted while it lives. Attention counts as a flash kernel's does.
Not counted: workspaces of libraries, fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

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
from sat_train.models.meters import RunMeter, flash_attention
from sat_train.models.recomputation import (
    blocks_differ,
    chosen_costs,
    saved_by_compiling,
    set_recomputation,
    without_recomputation,
)
from sat_train.planning.chunks import CountedChunks

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


@dataclass(frozen=True)
class Count:
    """Memory and work of a run of a network.

    Args:
        peak: The most bytes that live at once, without weights and their gradients.
        work: Its work.
    """

    peak: float
    work: Work


def count_passes(
    config: RunConfig,
    *,
    batch_size: int,
    training: bool = True,
    compiled: bool = False,
    plain: Work | None = None,
) -> Count:
    """Counts a forward and backward pass.

    Args:
        config: Model, size of the clips and what is recomputed.
        batch_size: Samples.
        training: Off: a forward pass without gradients.
        compiled: Blocks are compiled, and keep less where they recompute nothing; what one of them takes
            besides counts as an eager one's, and so does all work.
        plain: Work of passes that recompute nothing, where it is known.
    """
    count_blocks = partial(_pass, config, batch_size, training, compiled)
    if not training:
        return _extrapolated(config, count_blocks)
    if blocks_differ(config):
        plain = plain or count_passes(without_recomputation(config), batch_size=batch_size).work
        work = _with_chosen(config, plain, batch_size, compiled)
        count = Count(count_blocks(config.spec.layers).peak, work)
    else:
        count = _extrapolated(config, count_blocks)
    less = saved_by_compiling(config) if compiled else []
    # the block whose backward runs has what an eager one keeps
    return replace(count, peak=count.peak - sum(less[1:]) * batch_size / config.args.batch_size)


def _with_chosen(config: RunConfig, plain: Work, batch_size: int, compiled: bool) -> Work:
    """Returns the work of passes in which one block recomputes another part than the next."""
    costs, samples = chosen_costs(config, compiled=compiled), batch_size / config.args.batch_size
    return Work(
        moved_bytes=plain.moved_bytes + samples * sum(cost.moved for cost in costs),
        linear_flops=plain.linear_flops + samples * sum(cost.linear for cost in costs),
        attention_flops=plain.attention_flops + samples * sum(cost.attention for cost in costs),
        attention_backward_flops=plain.attention_backward_flops,
        summed_bytes=plain.summed_bytes + samples * sum(cost.summed for cost in costs),
    )


def _extrapolated(config: RunConfig, count: Callable[[int], Count]) -> Count:
    """Returns a count at the model's depth: of all blocks, or on a line through two models of fewer.

    Modules act in some blocks only, so these are counted as they are.
    """
    layers = config.spec.layers
    if counts_modules(config):
        return count(layers)
    low, high = (count(depth) for depth in _DEPTHS)
    steps = (layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])

    def at_depth(a: float, b: float) -> float:
        return a + (b - a) * steps

    work = Work(*map(at_depth, astuple(low.work), astuple(high.work)))
    return Count(at_depth(low.peak, high.peak), work)


def _pass(config: RunConfig, batch_size: int, training: bool, compiled: bool, layers: int) -> Count:
    """Counts the pass of a transformer of a few layers."""
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

    return _count(RunMeter(dit), run)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _count(meter: RunMeter, run: Callable[[], Any]) -> Count:
    with flash_attention(), meter:
        run()
    flops, traffic = meter.flops, meter.traffic
    forward = flops.attention - flops.attention_backward
    work = Work(traffic.moved, flops.linear, forward, flops.attention_backward, traffic.summed)
    return Count(meter.living.peak, work)


def count_captions(config: RunConfig) -> Count:
    """Counts T5 with the captions that precompute gives it together on a GPU."""
    count = captions_at_once(config.require_data().captions_at_once, on_gpu=True)
    ids = torch.empty(count, config.spec.text.max_length, dtype=torch.int64, device="meta")
    encoder = build_meta_text_encoder(config)
    return _count(RunMeter(encoder), partial(encoder, ids))


def count_encoding(config: RunConfig) -> Count:
    """Counts the autoencoder's encoding of one clip."""
    vae, data = build_meta_vae(config), config.require_data().params
    clip = torch.empty(1, data.max_num_frames, 3, *data.video_size, device="meta")
    meter = RunMeter(vae)
    vae.add_module("encoder", CountedChunks(vae.encoder, meter))
    return _count(meter, partial(vae.encode_moments, clip))


def count_decoding(config: RunConfig) -> Count:
    """Counts the autoencoder's decoding of one video."""
    vae = build_meta_vae(config)
    meter, latent = RunMeter(vae), build_meta_latent(config, 1, vae.z_channels)
    vae.add_module("decoder", CountedChunks(vae.decoder, meter))
    return _count(meter, partial(vae.decode, latent, vae.sample_tiling))

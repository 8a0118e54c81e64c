"""GPU memory of each phase of a run, by what takes it, in bytes.

Weights, gradients and states follow from the layout of the ZeRO stage (`engine/owned.py`); activations are
counted (`counting.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sat_train.config import RunConfig
from sat_train.engine.owned import row_length
from sat_train.engine.reduction import bucket_bytes, overlaps
from sat_train.engine.undivided import is_undivided
from sat_train.models.build import compute_dtype, encoder_dtype
from sat_train.models.frozen_layers import hold_frozen_weights
from sat_train.models.meta_models import build_meta_dit, build_meta_text_encoder, build_meta_vae

CONTEXT_BYTES = 2e9  # CUDA context, NCCL and the libraries' workspaces, which nobody counts
MASTER_BYTES = 4  # bytes of a weight in fp32


@dataclass(frozen=True)
class Weights:
    """Numbers of weights on one rank of the model axis.

    Args:
        transformer: All of the transformer, adapters and modules included.
        trained: Of each weight that trains.
        vae: The video autoencoder.
        text_encoder: T5.
        held: Those of the transformer that are held in few bits or in host memory.
        held_bytes: What these take of the GPU.
        host_bytes: What these take of host memory.
    """

    transformer: int
    trained: tuple[int, ...]
    vae: int
    text_encoder: int
    held: int = 0
    held_bytes: float = 0.0
    host_bytes: float = 0.0

    @property
    def num_trained(self) -> int:
        """Trained weights in all."""
        return sum(self.trained)


def count_weights(config: RunConfig) -> Weights:
    """Counts the weights of a configuration; a text encoder that is not there counts as T5-XXL."""
    dit, args = build_meta_dit(config), config.args
    total, others = _size(dit), sum(buffer.nbytes for buffer in dit.buffers())
    swap = hold_frozen_weights(
        dit, device=torch.device("meta"), quantization=args.quantize_base, swapped=args.block_swap
    )
    return Weights(
        transformer=total,
        trained=tuple(each.numel() for each in dit.parameters() if each.requires_grad),
        vae=_size(build_meta_vae(config)),
        text_encoder=_size(build_meta_text_encoder(config)),
        held=total - _size(dit),
        held_bytes=sum(buffer.nbytes for buffer in dit.buffers()) - others + swap.device_bytes,
        host_bytes=swap.host_bytes,
    )


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes on one GPU in one phase of a run, at its worst moment.

    Args:
        phase: The phase.
        weights: Of the transformer.
        gradients: Of the trained weights.
        optimizer: fp32 masters, optimizer states and the moving average.
        activations: What a forward and backward pass, or the update, takes besides.
        buffers: Of collectives, and the CUDA context.
        encoders: Text encoder and autoencoder.
        host: Bytes of host memory of the rank, apart from libraries.
    """

    phase: str
    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    buffers: float = CONTEXT_BYTES
    encoders: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        """GPU memory in all."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.buffers, self.encoders)
        return sum(parts)


@dataclass(frozen=True)
class StateMemory:
    """Bytes of one rank that last from step to step, and those of the update.

    Args:
        weights: The transformer's, in the dtype of computation.
        gradients: The most that lasts between operations of a backward pass.
        optimizer: Masters, states and the moving average that are on the GPU.
        offloaded: Those that are in host memory.
        offloaded_copies: Gradients, and weights on their way, that are in host memory with these.
        swapped: Weights that are in host memory.
        buffers: Of collectives.
        update: What the update takes besides, when activations are gone.
    """

    weights: float
    gradients: float
    optimizer: float
    offloaded: float
    offloaded_copies: float
    swapped: float
    buffers: float
    update: float


def layout_stage(config: RunConfig, data_ranks: int) -> int:
    """Returns the ZeRO stage whose layout a run has: 0 for a single process with fp32 weights."""
    undivided = is_undivided(
        stage=config.args.zero_stage,
        ranks=data_ranks * config.args.model_parallel_size,
        is_half=compute_dtype(config.args).itemsize < MASTER_BYTES,
        is_offloaded=config.deepspeed.zero_optimization.offload_optimizer.device == "cpu",
    )
    return 0 if undivided else config.args.zero_stage


def count_states(config: RunConfig, weights: Weights, *, data_ranks: int) -> StateMemory:
    """Computes the lasting bytes of one rank from the layout of the ZeRO stage.

    Args:
        config: Stage, optimizer, precision and offload.
        weights: From `count_weights`.
        data_ranks: Ranks that share the states.
    """
    zero, stage = config.deepspeed.zero_optimization, layout_stage(config, data_ranks)
    element = compute_dtype(config.args).itemsize
    trained, total = weights.num_trained, weights.transformer
    is_offloaded = zero.offload_optimizer.device == "cpu"
    share = trained if stage == 0 else trained / data_ranks
    if stage in (1, 2):
        share = row_length(weights.trained, data_ranks)
    average = MASTER_BYTES if config.args.ema_decay is not None else 0
    masters = 0 if stage == 0 else MASTER_BYTES
    states = (masters + average + config.deepspeed.optimizer.params.bytes_per_weight()) * share
    frozen_and_padded = total - weights.held - trained + (share * data_ranks if stage in (1, 2) else trained)
    accumulates = config.args.gradient_accumulation_steps > 1
    # stage 1 reduces in the last micro-step, and during its backward pass where it overlaps; stage 2 in each
    is_late = accumulates or not overlaps(zero, data_ranks=data_ranks, on_gpu=True)
    whole = stage == 0 or (stage == 1 and is_late)
    # gradients leave for host memory as buckets are reduced, and add up there
    kept = trained if whole else 0.0 if is_offloaded else share
    copies = MASTER_BYTES + element * (2 if stage == 2 and accumulates else 1)
    summed = MASTER_BYTES if config.deepspeed.data_types.grad_accum_dtype == "fp32" else element
    return StateMemory(
        weights=element * (total / data_ranks if stage == 3 else frozen_and_padded) + weights.held_bytes,
        gradients=summed * kept,
        optimizer=0.0 if is_offloaded else states,
        offloaded=states if is_offloaded else 0.0,
        offloaded_copies=copies * share if is_offloaded else 0.0,
        swapped=weights.host_bytes,
        buffers=(stage > 0 or data_ranks > 1)
        * bucket_bytes(config.deepspeed, trained=trained, data_ranks=data_ranks, element=element)
        # one gradient on its way from host memory
        + (element * max(weights.trained) if is_offloaded and stage < 3 else 0.0),
        # the fp32 gradient, and DeepSpeed's flat copy of the half-precision one
        update=0.0
        if is_offloaded or stage == 0
        else (MASTER_BYTES + (summed if summed < MASTER_BYTES else 0)) * share,
    )


@dataclass(frozen=True)
class EncoderMemory:
    """Bytes of the frozen encoders of one rank.

    Args:
        vae: The autoencoder.
        text: T5 on the GPU.
        host: T5 on the CPU.
    """

    vae: float
    text: float
    host: float

    @property
    def gpu(self) -> float:
        """Those on the GPU."""
        return self.vae + self.text


def count_encoders(config: RunConfig, weights: Weights) -> EncoderMemory:
    """Computes the bytes of both encoders."""
    element, on_host = encoder_dtype(config.args).itemsize, config.args.text_encoder_device == "cpu"
    text = element * weights.text_encoder
    return EncoderMemory(element * weights.vae, 0.0 if on_host else text, text if on_host else 0.0)

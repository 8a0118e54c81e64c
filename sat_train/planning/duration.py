"""Time of a step, computed from what it does and what a card reaches.

    t = linear / matmul + attention / its forward + backward / its backward + bytes moved / memory
        + what collectives and the optimizer take when nothing hides them

The FLOPs here count what is recomputed; MFU counts those of the model alone (`NetworkSpec.training_flops`).
"""

from __future__ import annotations

from dataclasses import dataclass

from sat_train.config import RunConfig
from sat_train.config.hardware import Hardware
from sat_train.engine.compilation import compiles_on_gpus
from sat_train.engine.reduction import reduced_element_bytes, reduces_to_owners
from sat_train.models.build import compute_dtype
from sat_train.planning.counting import Work
from sat_train.planning.gpu_memory import MASTER_BYTES, Weights

_TERA, _GIGA = 1e12, 1e9
_HOST_UPDATE_S = 2.4e-9  # an element of torch's AdamW on 16 cores, measured
_HOST_TFLOPS = 1.0  # of a rank's share of a server's processors, for matrix products in bf16
# bytes that elementwise operations of a compiled block move, by those of an eager one, with all weights and
# with frozen ones: `benchmarks/block.py compiled --width 512`
_COMPILED_TRAFFIC, _COMPILED_TRAFFIC_FROZEN = 126 / 172, 110 / 153
# rate of an eager block's elementwise operations, by that of a compiled one's: 1.01 TB in 0.66 s of an H100
_EAGER_RATE = 0.57
# bytes a weight that DeepSpeed moves besides the update, in half precision: the gradient into bucket and
# partition (8), flat (4), in fp32 (6), unscaled (8), its norm in double precision (18), the master into the
# weight (4)
_DEEPSPEED_TRAFFIC = 48
HOST_COPY_GBPS = 20  # between GPU and host


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step of one rank.

    Args:
        linear: Matrix products.
        attention: Attention, forward and backward.
        elementwise: Everything that is bound by memory.
        communication: Collectives, if nothing hides them.
        optimizer: The update.
        encoding: Autoencoder and T5, where samples are not cached.
        swapping: What copies of weights and inputs of blocks take beyond the computation that hides them.
    """

    linear: float
    attention: float
    elementwise: float
    communication: float
    optimizer: float
    encoding: float
    swapping: float = 0.0

    @property
    def total(self) -> float:
        """The step."""
        parts = (self.linear, self.attention, self.elementwise)
        return sum((*parts, self.communication, self.optimizer, self.encoding, self.swapping))


def elementwise_factor(config: RunConfig) -> float:
    """Returns the time of elementwise operations, by that of an eager block's bytes at the card's rate."""
    if not compiles_on_gpus(config.args):
        return 1 / _EAGER_RATE
    return _COMPILED_TRAFFIC_FROZEN if config.freezes_base else _COMPILED_TRAFFIC


def computing_seconds(work: Work, card: Hardware, *, elementwise_factor: float) -> tuple[float, float, float]:
    """Returns seconds of matrix products, attention and elementwise operations.

    Args:
        work: Of eager blocks.
        card: The card.
        elementwise_factor: From the function of this name.
    """
    linear = work.linear_flops / card.matmul_tflops
    forward = work.attention_flops / card.attention_tflops
    backward = work.attention_backward_flops / card.attention_backward_tflops
    elementwise = elementwise_factor * work.moved_bytes / card.memory_tbps
    return linear / _TERA, (forward + backward) / _TERA, elementwise / _TERA


def communication_seconds(
    config: RunConfig, weights: Weights, card: Hardware, *, data_ranks: int, gpus: int
) -> float:
    """Returns the seconds of ZeRO's collectives in a step.

    Stage 2 reduces in every micro-step, stages 0 and 1 once a step. Below stage 3 a gradient crosses twice,
    in an all-reduce, unless buckets are reduced to the owners. Stage 3 gathers all weights for the forward,
    for what is recomputed and for the backward.
    """
    if data_ranks == 1:
        return 0.0
    section, stage = config.deepspeed, config.args.zero_stage
    micro_steps = config.args.gradient_accumulation_steps
    element = compute_dtype(config.args).itemsize
    gradients = reduced_element_bytes(section, element) * weights.num_trained
    if stage == 3:
        gathers = 3 if config.args.recomputes else 2
        volume = micro_steps * (gathers * element * weights.transformer + gradients)
    else:
        crossings = 1 if reduces_to_owners(section.zero_optimization) else 2
        reductions = micro_steps if stage == 2 else 1
        volume = reductions * crossings * gradients + (element * weights.num_trained if stage else 0)
    return volume * (data_ranks - 1) / data_ranks / card.collective_gbps(gpus) / _GIGA


def summing_seconds(summed: float, card: Hardware, *, ranks: int) -> float:
    """Returns the seconds of sums over the ranks of a model, which share a machine.

    Args:
        summed: Bytes of the tensors.
        card: The card.
        ranks: Ranks of a model; a sum sends each byte twice to all but one of them.
    """
    return 2 * summed * (ranks - 1) / ranks / card.link_gbps / _GIGA


def swapping_seconds(copied: float, *, computing: float) -> float:
    """Returns the seconds of a step in which blocks wait for copies between host memory and the GPU.

    Args:
        copied: Bytes of a step.
        computing: Seconds of computation, behind which they are copied.
    """
    return max(0.0, copied / HOST_COPY_GBPS / _GIGA - computing)


def optimizer_seconds(config: RunConfig, card: Hardware, *, elements: float) -> float:
    """Returns the seconds of the update of so many elements: masters, states, and copies of DeepSpeed's.

    In host memory the processors of the rank compute it, between copies of gradients and weights.
    """
    if config.deepspeed.zero_optimization.offload_optimizer.device == "cpu":
        return elements * (_HOST_UPDATE_S + 4 / HOST_COPY_GBPS / _GIGA)
    state = config.deepspeed.optimizer.params.bytes_per_weight()
    copies = _DEEPSPEED_TRAFFIC if compute_dtype(config.args).itemsize < MASTER_BYTES else 0
    return elements * (2 * (4 + state) + 4 + 2 + copies) / card.memory_tbps / _TERA


def encoding_seconds(
    work: Work, weights: Weights, card: Hardware, *, text_tokens: int, text_on_host: bool
) -> float:
    """Returns the seconds of autoencoder and T5 for one sample."""
    text = 2 * weights.text_encoder * text_tokens / (_HOST_TFLOPS if text_on_host else card.matmul_tflops)
    convolutions = work.linear_flops / card.convolution_tflops
    elementwise = work.moved_bytes / card.memory_tbps / _EAGER_RATE
    return (text + convolutions + elementwise) / _TERA

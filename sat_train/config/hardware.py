"""GPUs and how fast they compute what a step consists of.

The rates are what kernels reach, not what data sheets promise. Attention is at a head width of 64, where
kernels are slower than at 128. Measured rates of a card replace these with `--efficiency`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sat_train.config.catalog import suggest_value
from sat_train.config.values import COMMAND_LINE
from sat_train.errors import ConfigError, Fault

GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class Hardware:
    """One GPU, and its connection to the others.

    Args:
        name: As `--hardware` spells it.
        memory_gib: Memory.
        peak_tflops: Peak of half-precision matrix products, which MFU refers to.
        matmul_tflops: Matrix products of this model's sizes.
        convolution_tflops: 3D convolutions of the autoencoder.
        attention_tflops: Forward of attention.
        attention_backward_tflops: Its backward.
        memory_tbps: Compiled elementwise operations, TB/s.
        link_gbps: Collectives within a machine, GB/s.
        network_gbps: Collectives between machines, GB/s for each GPU.
    """

    name: str
    memory_gib: float
    peak_tflops: float
    matmul_tflops: float
    convolution_tflops: float
    attention_tflops: float
    attention_backward_tflops: float
    memory_tbps: float
    link_gbps: float
    network_gbps: float

    def scaled(self, efficiency: float) -> Hardware:
        """Returns the card with all rates but the peak times a factor."""
        rates = (
            "matmul_tflops",
            "convolution_tflops",
            "attention_tflops",
            "attention_backward_tflops",
            "memory_tbps",
        )
        return replace(self, **{rate: getattr(self, rate) * efficiency for rate in rates})

    def collective_gbps(self, gpus: int) -> float:
        """Returns the bandwidth of collectives over so many GPUs, GB/s."""
        return self.link_gbps if gpus <= GPUS_OF_A_MACHINE else self.network_gbps


# The H100's rates of matrix products, convolutions and attention (cuDNN's kernels) are measured in steps and
# in the autoencoder, at the card's limit of power; a kernel alone is faster by a tenth (docs/benchmarks.md).
# The others' are scaled by it: matrix products at three quarters of the peak (L40S: 0.6), convolutions at
# 0.22, attention at 0.95 forward and 0.92 backward of what FlashAttention-2 reaches at a head width of 64
# (arXiv:2307.08691, figures 4 and 5), or the same share of the peak. Elementwise operations: 0.8 of the
# memory's bandwidth. 400 Gb/s of network for each GPU of a machine with NVLink, 100 without.
HARDWARE = {
    card.name: card
    for card in (
        Hardware("h100", 80, 989, 745, 215, 395, 400, 2.7, 300, 50),
        Hardware("h200", 141, 989, 745, 215, 395, 400, 3.9, 300, 50),
        Hardware("a100", 80, 312, 235, 68, 180, 152, 1.6, 200, 25),
        Hardware("a100-40", 40, 312, 235, 68, 180, 152, 1.25, 200, 25),
        Hardware("l40s", 48, 362, 215, 68, 124, 106, 0.7, 20, 12),
        Hardware("rtx4090", 24, 165, 125, 36, 86, 74, 0.8, 20, 12),
    )
}


def find_hardware(name: str) -> Hardware:
    """Returns a card by name.

    Raises:
        ConfigError: It is not known.
    """
    if name not in HARDWARE:
        near = suggest_value(name.replace("_", "-"), list(HARDWARE))
        raise ConfigError([Fault("--hardware", name, f"one of {', '.join(HARDWARE)}", COMMAND_LINE, near)])
    return HARDWARE[name]


def peak_tflops(device_name: str) -> float | None:
    """Returns the peak of half-precision matrix products of a card.

    Args:
        device_name: As CUDA spells it, such as `NVIDIA H100 80GB HBM3`.

    Returns:
        TFLOP/s; None for a card that is not in the table.
    """
    cards = sorted(cards_named(device_name), key=lambda card: card.name)
    return cards[0].peak_tflops if cards else None


def cards_named(device_name: str) -> list[Hardware]:
    """Returns the cards of the table with the name that CUDA spells so; they differ in memory."""
    words = device_name.lower().replace("geforce ", "").replace("rtx ", "rtx").replace("-", " ").split()
    return [card for card in HARDWARE.values() if card.name.partition("-")[0] in words]

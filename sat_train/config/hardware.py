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
        memory_tbps: Elementwise operations, TB/s.
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


# Matrix products at two thirds of the peak, convolutions at a quarter, elementwise operations at 0.8 of the
# memory's bandwidth. Attention on Hopper: cuDNN's figures in the FlashAttention-3 paper (arXiv:2407.08608,
# figures 5 and 6, head width 64); elsewhere FlashAttention-2 (arXiv:2307.08691, figures 4 and 5), or the same
# share of the peak. 400 Gb/s of network for each GPU of a machine with NVLink, 100 without.
HARDWARE = {
    card.name: card
    for card in (
        Hardware("h100", 80, 989, 650, 250, 413, 433, 2.7, 300, 50),
        Hardware("h200", 141, 989, 650, 250, 413, 433, 3.9, 300, 50),
        Hardware("a100", 80, 312, 220, 80, 190, 165, 1.6, 200, 25),
        Hardware("a100-40", 40, 312, 220, 80, 190, 165, 1.25, 200, 25),
        Hardware("l40s", 48, 362, 200, 80, 130, 115, 0.7, 20, 12),
        Hardware("rtx4090", 24, 165, 130, 40, 90, 80, 0.8, 20, 12),
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

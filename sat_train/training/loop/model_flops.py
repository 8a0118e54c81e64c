"""FLOPs of the model on a batch, and the peak of the card that they are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sat_train.config.hardware import peak_tflops
from sat_train.config.parts.adapter_parts import find_adapter_tensor
from sat_train.data.batches import LoadedBatch
from sat_train.data.dataset import VideoDataset
from sat_train.models.dit.transformer import DiffusionTransformer


def flops_counter(dit: DiffusionTransformer, data: VideoDataset) -> Callable[[LoadedBatch], float]:
    """Returns a counter of the model's FLOPs on a batch, forward and backward, without what is recomputed."""
    spec = dit.spec
    trains_base = any(
        parameter.requires_grad and find_adapter_tensor(name) is None
        for name, parameter in dit.transformer.named_parameters()
    )

    def count(batch: LoadedBatch) -> float:
        clip = data.shape(batch.sample_indices[0])  # that of all samples
        tokens = spec.tokens(spec.latent(clip.frames, clip.height, clip.width))
        return float(len(batch.clip_ids) * spec.training_flops(tokens, trains_base=trains_base))

    return count


def peak_of(device: torch.device) -> float | None:
    """Returns the peak of a device in TFLOP/s; None for a CPU and for cards that are not known."""
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

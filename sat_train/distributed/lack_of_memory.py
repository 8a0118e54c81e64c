"""Out-of-memory errors with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sat_train.errors import TrainingError

_NO_HOST_MEMORY = "can't allocate memory"  # message of PyTorch's CPU allocator, in a plain RuntimeError

TRAINING_REMEDY = (
    "in this order: sat-train precompute and data.cache=require (neither T5 nor the autoencoder is loaded), "
    "args.batch_size=1 with more args.gradient_accumulation_steps, args.checkpoint_activations=true, LoRA, "
    "more GPUs, configs/parallel/zero3.yaml; sat-train plan computes what is enough"
)
PRECOMPUTE_REMEDY = (
    "args.bf16=true, args.text_encoder_device=cpu, model.first_stage_config.params.tiling=true (other "
    "latents, so in training too), fewer or smaller frames in data.params"
)
SAMPLING_REMEDY = (
    "args.bf16=true, model.first_stage_config.params.tile_samples=true (tiles are on unless switched off), "
    "a smaller args.sampling_image_size or args.sampling_num_frames"
)


@contextmanager
def explaining_lack_of_memory(remedy: str) -> Iterator[None]:
    """Turns a failed allocation, on the device or the CPU, into an error with a remedy.

    Args:
        remedy: Settings that reduce memory.

    Raises:
        TrainingError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        first_line = (str(error).splitlines() or ["the CPU has none left"])[0]
        raise TrainingError(f"out of memory: {first_line}", remedy=remedy) from error


def _is_lack_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_HOST_MEMORY in str(error)

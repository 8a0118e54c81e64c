"""Copies from host memory to the device that computes, which do not wait for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device, behind the work that is queued there, while the host continues.

    A GPU can do that from page-locked memory alone, which PyTorch keeps until the copy is complete. A dtype
    has to be changed after the copy: with `to(device, dtype)` it is changed first, into pageable memory.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    # towards the host the tensor would be read before it is there
    return tensor.to(device, non_blocking=device.type != "cpu")

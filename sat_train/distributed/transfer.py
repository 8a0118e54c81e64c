"""Copies between host memory and the device that computes, which hold up neither."""

from __future__ import annotations

from collections.abc import Mapping

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


class CopyToHost:
    """Copies of tensors in host memory, made behind the work that is queued on their GPU.

    Args:
        tensors: By name; they may change once this has returned.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # from a GPU, `non_blocking` gives page-locked memory, and returns before it is filled
        self._copies = {
            name: each.detach().to("cpu", non_blocking=True, copy=True) for name, each in tensors.items()
        }
        self._is_complete = torch.cuda.Event() if any(each.is_cuda for each in tensors.values()) else None
        if self._is_complete is not None:
            self._is_complete.record()

    def wait(self) -> dict[str, Tensor]:
        """Returns the copies once they are complete, in pageable memory; any thread may call it."""
        if self._is_complete is None:
            return self._copies
        self._is_complete.synchronize()
        return {name: copy.clone() for name, copy in self._copies.items()}

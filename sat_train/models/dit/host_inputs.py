"""Inputs of recomputed blocks in host memory, between the forward that makes them and the backward.

They leave on a stream of their own while the next block computes. A backward asks for them in the reverse
order: with each, the one before it is copied back meanwhile.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


class HostInput:
    """One input in host memory.

    Args:
        x: On the device; on the meta device, where plans are counted, nothing is kept.
        stream: Where the copies run; None: on the CPU.
    """

    def __init__(self, x: Tensor, stream: torch.cuda.Stream | None) -> None:
        self._device, self._stream = x.device, stream
        self._on_device: Tensor | None = None
        self._copied: Any = None
        if x.device.type == "meta":
            self._host = x.new_empty(()).expand(x.shape)
            return
        self._host = torch.empty_like(x, device="cpu", pin_memory=stream is not None)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
            x.record_stream(stream)
        with _on(stream):
            self._host.copy_(x, non_blocking=True)

    def start(self) -> None:
        """Starts the copy back to the device."""
        if self._on_device is None:
            with _on(self._stream):
                self._on_device = self._host.to(self._device, non_blocking=True, copy=True)
                self._copied = self._stream.record_event() if self._stream is not None else None

    def take(self) -> Tensor:
        """Returns the input on the device."""
        self.start()
        x, self._on_device = self._on_device, None
        assert x is not None, "its copy has been started"
        if self._copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._copied)
            x.record_stream(stream)
        return x


class HostInputs:
    """Moves what a checkpoint keeps of its block's inputs to host memory."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._kept: list[weakref.ref[HostInput]] = []  # in the order of the forward

    def around(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Returns a context for the call of a checkpoint; what its block saves has hooks of its own."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, x: Tensor) -> HostInput | Tensor:
        if not x.numel():
            return x
        if x.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        kept = HostInput(x.detach(), self._stream)
        self._kept = [each for each in self._kept if each() is not None]
        self._kept.append(weakref.ref(kept))
        return kept

    def _unpack(self, kept: HostInput | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        x = kept.take()
        order = [each() for each in self._kept]
        at = next(index for index, each in enumerate(order) if each is kept)
        before = next((each for each in reversed(order[:at]) if each is not None), None)
        if before is not None:
            before.start()
        return x


def _on(stream: torch.cuda.Stream | None) -> Any:
    return nullcontext() if stream is None else torch.cuda.stream(stream)

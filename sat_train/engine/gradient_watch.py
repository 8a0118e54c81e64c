"""Gradients of a backward pass: which trained parameters get one, and of which it is exactly zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class GradientWatch:
    """Inspects the gradient of each trained parameter when a backward pass hands it over.

    It sees what autograd gives on this rank, before ZeRO divides it: at stages 1 to 3 the engine has zeros
    for a parameter without a gradient, and nothing at all for one that another rank owns. While it is open
    each gradient costs one pass over it; once it is closed nothing.

    Args:
        module: The module, inside the engine or not.
    """

    def __init__(self, module: nn.Module) -> None:
        self._largest: dict[str, Tensor] = {}
        self._names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._hooks = [
            parameter.register_hook(self._looking_at(name))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]

    def missing(self) -> set[str]:
        """Returns the parameters that have had no gradient since `restart`."""
        return set(self._names) - self._largest.keys()

    def zero(self) -> set[str]:
        """Returns the parameters whose gradients since `restart` were exactly zero. Waits for the device."""
        if not self._largest:
            return set()
        largest = torch.stack([value.float() for value in self._largest.values()]).tolist()
        return {name for name, value in zip(self._largest, largest, strict=True) if value == 0}

    def restart(self) -> None:
        """Forgets the gradients seen so far."""
        self._largest.clear()

    def close(self) -> None:
        """Ends the watch."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _looking_at(self, name: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            largest = gradient.detach().abs().amax()
            self._largest[name] = torch.maximum(largest, self._largest.get(name, largest))

        return look

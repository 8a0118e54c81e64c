"""The kernels that compute a run: of attention, and of matrix products in half precision on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from sat_train.config import ArgsConfig
from sat_train.models.attention import attention_kernels
from sat_train.models.build import compute_dtype
from sat_train.models.half_on_cpu import half_products


def chosen_kernels(args: ArgsConfig, device: torch.device) -> AbstractContextManager[None]:
    """Returns a context for forward, backward and what is recomputed, which must all use the same kernels.

    Args:
        args: The settings.
        device: Where the model computes.

    Raises:
        ConfigError: The kernel of attention that they name does not exist on this device.
    """
    return _both(attention_kernels(args, device), half_products(device, compute_dtype(args)))


@contextmanager
def _both(first: AbstractContextManager[object], second: AbstractContextManager[object]) -> Iterator[None]:
    with first, second:
        yield

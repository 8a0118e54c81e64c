"""Names, shapes and dtypes of weights, and the comparison of a model with a file before training."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sat_train.errors import CheckpointError

# Floating-point types by the names that commands and manifests use.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Shape = tuple[int, ...]
_MOST_SHOWN = 40  # of each kind


def check_names_and_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], *, where: str) -> None:
    """Compares the names and shapes of a model with those of a file.

    Args:
        expected: Names and shapes of the model.
        found: Names and shapes of the file.
        where: Names the file in the message.

    Raises:
        CheckpointError: With every missing name, every unexpected name, and every mismatch with both shapes.
    """
    missing = [f"missing     {name} {_text(expected[name])}" for name in expected if name not in found]
    unexpected = [f"unexpected  {name} {_text(found[name])}" for name in found if name not in expected]
    mismatched = [
        f"mismatched  {name}: the model has {_text(shape)}, the file {_text(found[name])}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if not (missing or unexpected or mismatched):
        return
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(mismatched)} of another shape"
    lines = [line for faults in (missing, unexpected, mismatched) for line in _shortened(faults)]
    raise CheckpointError(
        "\n  ".join([f"{where} does not fit the model: {counts}", *lines]),
        expected=f"the {len(expected)} names of the model, with its shapes",
        remedy="check the model preset: another family, size or LoRA rank has other names and shapes",
    )


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST_SHOWN
    return lines if more <= 0 else [*lines[:_MOST_SHOWN], f"... and {more} more"]


def _text(shape: Shape) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the short name of a floating-point type."""
    return next(name for name, candidate in DTYPES.items() if candidate == dtype)

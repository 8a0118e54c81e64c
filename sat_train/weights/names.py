"""Names, shapes and dtypes of weights, and the comparison of a model with a file before training."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch

from sat_train.config.parts.module_parts import TAKEN
from sat_train.errors import CheckpointError

# Floating-point types by the names that commands and manifests use.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Types of weights by their names in safetensors. int64 is for integers such as the rank of an adapter; 8 bits
# always mean a quantised weight, which is refused.
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
Shape = tuple[int, ...]
_MOST_SHOWN = 40  # of each kind


def module_of(key: str) -> str | None:
    """Returns the added module that a SAT key belongs to; None for a key of the base or of adapters."""
    parts = key.split(".")
    is_added = parts[0] == "mixins" and len(parts) > 2 and parts[1] not in TAKEN
    return parts[1] if is_added else None


def modules_in(keys: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of the added modules that have weights among the keys, sorted."""
    return tuple(sorted({name for key in keys if (name := module_of(key)) is not None}))


def check_names_and_shapes(
    expected: Mapping[str, Shape],
    file_shapes: Mapping[str, Shape],
    *,
    where: str,
    may_lack: Collection[str] = (),
) -> None:
    """Compares the names and shapes of a model with those of a file.

    Args:
        expected: Names and shapes of the model.
        file_shapes: Names and shapes of the file.
        where: Names the file in the message.
        may_lack: Names that the file need not hold: tables the model computes, adapters that begin at zero.

    Raises:
        CheckpointError: With every missing name, every unexpected name, and every mismatch with both shapes.
    """
    absent = [name for name in expected if name not in file_shapes]
    missing = [f"missing     {name} {_text(expected[name])}" for name in absent if name not in may_lack]
    strays = [name for name in file_shapes if name not in expected]
    unexpected = [f"unexpected  {name} {_text(file_shapes[name])}" for name in strays]
    mismatched = [
        f"mismatched  {name}: the model has {_text(shape)}, the file {_text(file_shapes[name])}"
        for name, shape in expected.items()
        if name in file_shapes and tuple(file_shapes[name]) != tuple(shape)
    ]
    if not (missing or unexpected or mismatched):
        return
    names = [name for name in absent if name not in may_lack]
    remedy = "check the model preset: another family, size or LoRA rank has other names and shapes"
    if names and not unexpected and not mismatched and all(map(module_of, names)):
        remedy = f"give the weights of {', '.join(modules_in(names))} too: args.load_modules=[FILE]"
    counts = f"{len(missing)} missing, {len(unexpected)} unexpected, {len(mismatched)} of another shape"
    lines = [line for faults in (missing, unexpected, mismatched) for line in _shortened(faults)]
    raise CheckpointError(
        "\n  ".join([f"{where} does not fit the model: {counts}", *lines]),
        expected=f"the {len(expected) - len(absent) + len(missing)} names of the model, with its shapes",
        remedy=remedy,
    )


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST_SHOWN
    return lines if more <= 0 else [*lines[:_MOST_SHOWN], f"... and {more} more"]


def _text(shape: Shape) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the short name of a floating-point type."""
    return next(name for name, candidate in DTYPES.items() if candidate == dtype)

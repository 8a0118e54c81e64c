"""Encodings of a sample and of a batch: input of the objective and content of the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from sat_train.data.batches import Sample, StepPosition
from sat_train.distributed.transfer import to_device

CLIP = "clip"  # the encoding of the clip itself, next to those of the conditions
MOMENTS = frozenset({"mean", "logvar"})  # its tensors
_ALIGNMENT = 64  # bytes, enough for any dtype and vector instruction

# By name, `clip` or a condition's, then by the tensor's name.
Encodings = dict[str, dict[str, Tensor]]
# Names, dtype, shape and first byte of each tensor in one shared buffer.
_Layout = tuple[tuple[str, str, torch.dtype, tuple[int, ...], int], ...]


@dataclass(frozen=True)
class EncodedSample(Sample):
    """One sample, encoded.

    Args:
        encodings: Its encodings, without batch dimension.
    """

    encodings: Encodings

    def to(self, device: torch.device) -> EncodedSample:
        """Returns the sample with its tensors on a device; the copies need not be complete."""
        return replace(self, encodings=_map(self.encodings, lambda tensor: to_device(tensor, device)))

    def pin_memory(self) -> EncodedSample:
        """Returns the sample in page-locked memory."""
        return replace(self, encodings=_map(self.encodings, Tensor.pin_memory))


@dataclass(frozen=True)
class EncodedBatch:
    """A batch for the objective.

    Args:
        encodings: Posterior moments of the clips (`clip`: `mean` and `logvar`, before the scale factor), and
            the encodings of each condition; batch first.
        clip_ids: Names for messages.
        sample_indices: Global positions. Key of all randomness.
        num_shown: Frames from each clip; the rest of a sample repeats the last of them.
        step_positions: Of each sample in the optimizer step that takes it; empty outside training.
    """

    encodings: Encodings
    clip_ids: tuple[str, ...]
    sample_indices: tuple[int, ...]
    num_shown: tuple[int, ...]
    step_positions: tuple[StepPosition, ...] = ()

    def __reduce__(self) -> tuple[Callable[..., EncodedBatch], tuple[Any, ...]]:
        """Pickles the batch as one tensor: each tensor that is sent costs a round trip and a mapping."""
        rest = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return _unpack, (*_pack(self.encodings), rest)

    def to(self, device: torch.device) -> EncodedBatch:
        """Returns the batch with its tensors on a device; the copies need not be complete."""
        return replace(self, encodings=_map(self.encodings, lambda tensor: to_device(tensor, device)))

    def pin_memory(self) -> EncodedBatch:
        """Returns the batch in page-locked memory. PyTorch's loader calls this by its name."""
        return replace(self, encodings=_map(self.encodings, Tensor.pin_memory))

    def at(self, step_positions: tuple[StepPosition, ...]) -> EncodedBatch:
        """Returns the batch with the positions of its samples in the optimizer step that takes it."""
        return replace(self, step_positions=step_positions)


def stack_samples(
    samples: Sequence[EncodedSample], step_positions: tuple[StepPosition, ...] = ()
) -> EncodedBatch:
    """Joins samples of one shape along a batch dimension."""
    first = samples[0].encodings
    return EncodedBatch(
        encodings={
            name: {part: stack_rows([s.encodings[name][part] for s in samples]) for part in first[name]}
            for name in first
        },
        clip_ids=tuple(sample.clip_id for sample in samples),
        sample_indices=tuple(sample.sample_index for sample in samples),
        num_shown=tuple(sample.num_shown for sample in samples),
        step_positions=step_positions,
    )


def stack_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Stacks tensors along a batch dimension; a single one is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _map(encodings: Encodings, change: Callable[[Tensor], Tensor]) -> Encodings:
    return {name: {part: change(t) for part, t in tensors.items()} for name, tensors in encodings.items()}


def _pack(encodings: Encodings) -> tuple[Tensor, _Layout]:
    """Copies CPU tensors into one buffer that other processes can map."""
    layout, size = [], 0
    for name, tensors in encodings.items():
        for part, tensor in tensors.items():
            layout.append((name, part, tensor.dtype, tuple(tensor.shape), size))
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
    packed = memory, tuple(layout)
    for name, views in _views(*packed).items():
        for part, view in views.items():
            view.copy_(encodings[name][part])
    return packed


def _views(memory: Tensor, layout: _Layout) -> Encodings:
    storage = memory.untyped_storage()
    views: Encodings = {}
    for name, part, dtype, shape, start in layout:
        view = torch.empty(0, dtype=dtype)
        # contiguous, as its strides are left out, which PyTorch's type stubs do not allow
        view = view.set_(storage, start // dtype.itemsize, shape)  # type: ignore[call-overload]
        views.setdefault(name, {})[part] = view
    return views


def _unpack(memory: Tensor, layout: _Layout, rest: dict[str, Any]) -> EncodedBatch:
    return EncodedBatch(encodings=_views(memory, layout), **rest)

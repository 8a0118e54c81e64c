"""What the loader hands over: one sample, and a batch of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sat_train.data.augmentation_key import AugmentationKey
from sat_train.data.batches import StepPosition
from sat_train.data.cache.key import SampleKeys

_ALIGNMENT = 64  # bytes: any dtype and vector instruction

_Record = TypeVar("_Record", "CachedSample", "VideoBatch")


@dataclass(frozen=True)
class CachedSample:
    """Encoded tensors of a batch, read from the cache instead of being computed.

    Args:
        mean_btchw: Mean of the VAE's posterior, before the scale factor.
        logvar_btchw: Its log-variance; a latent is drawn again from both each time.
        text_bld: Text embeddings.
        image_latent_btchw: Mean of the first frame's posterior, for image-to-video; None for text-to-video.
        image_logvar_btchw: Its log-variance; None takes the mean as it is.
    """

    mean_btchw: Tensor
    logvar_btchw: Tensor
    text_bld: Tensor
    image_latent_btchw: Tensor | None = None
    image_logvar_btchw: Tensor | None = None

    def __reduce__(self) -> tuple[Callable[..., CachedSample], tuple[Tensor, _Layout]]:
        """Travels to another process as one tensor: each that is sent costs a round trip and a mapping."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return _unpack_cached, _pack_tensors({k: t for k, t in tensors.items() if t is not None})

    def unsqueezed(self) -> CachedSample:
        """Makes a batch of one of a sample's tensors, which have no batch dimension yet."""
        return _map_tensors(self, lambda tensor: tensor[None])


# Name, dtype, shape and first byte of each tensor in a common piece of memory.
_Layout = tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]


def _pack_tensors(tensors: dict[str, Tensor]) -> tuple[Tensor, _Layout]:
    """Copies tensors of the CPU into one piece of memory that other processes can map."""
    layout, size = [], 0
    for name, tensor in tensors.items():
        layout.append((name, tensor.dtype, tuple(tensor.shape), size))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
    packed = memory, tuple(layout)
    for name, view in _views(*packed).items():
        view.copy_(tensors[name])
    return packed


def _views(memory: Tensor, layout: _Layout) -> dict[str, Tensor]:
    storage = memory.untyped_storage()
    views: dict[str, Tensor] = {}
    for name, dtype, shape, start in layout:
        view = torch.empty(0, dtype=dtype)
        # contiguous, as its strides are left out, which the types of PyTorch do not know
        views[name] = view.set_(storage, start // dtype.itemsize, shape)  # type: ignore[call-overload]
    return views


def _unpack_cached(memory: Tensor, layout: _Layout) -> CachedSample:
    return CachedSample(**_views(memory, layout))


@dataclass(frozen=True)
class VideoBatch:
    """A batch as the pipeline sees it.

    Args:
        video_btchw: Pixels, uint8 RGB; None when `cached` stands in for them.
        captions: One text a sample.
        image_bchw: Pixels of the image that conditions each clip, uint8; None: the clip's first frame is it.
        clip_ids: Names for messages.
        sample_indices: Global positions. Key of all randomness.
        num_shown: Frames that each clip gave; the rest of a sample repeats the last of them.
        cached: Encoded tensors; None without the cache.
        augmentations: Key of what is random about each sample's pixels; empty: the sample's index is.
        keys: Where each sample's encodings belong in the cache; empty without one.
        step_positions: Of each sample in the optimizer step that takes it; empty outside training.
    """

    video_btchw: Tensor | None
    captions: tuple[str, ...]
    image_bchw: Tensor | None
    clip_ids: tuple[str, ...]
    sample_indices: tuple[int, ...]
    num_shown: tuple[int, ...]
    cached: CachedSample | None = None
    augmentations: tuple[AugmentationKey, ...] = ()
    keys: tuple[SampleKeys, ...] = ()
    step_positions: tuple[StepPosition, ...] = ()

    def __len__(self) -> int:
        return len(self.sample_indices)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> VideoBatch:
        """Returns the batch with its tensors on `device`; uint8 pixels stay uint8."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> VideoBatch:
        """Returns the batch in page-locked memory. PyTorch's loader calls this by its name."""
        return _map_tensors(self, torch.Tensor.pin_memory)


def _map_tensors(record: _Record, change: Callable[[Tensor], Tensor]) -> _Record:
    """Returns a copy of a record (and of the records in it) with `change` done to each of its tensors."""
    changed: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif isinstance(value, CachedSample):
            changed[field.name] = _map_tensors(value, change)
    return replace(record, **changed)


@dataclass(frozen=True)
class VideoSample:
    """One sample.

    Args:
        video_tchw: Pixels, uint8 RGB; None when `cached` stands in for them.
        caption: Its text.
        image_chw: Pixels of a given conditioning image, uint8; None: the first frame is it.
        clip_id: Name for messages.
        sample_index: Global position.
        num_shown: Frames that the clip gave; the rest repeats the last of them.
        times: When each frame is shown in its file, in seconds; empty when no pixels were read.
        augmentation: Key of what is random about its pixels.
        keys: Where its encodings belong in the cache; None without one.
        cached: Its encodings, as a batch of one; None without the cache.
    """

    video_tchw: Tensor | None
    caption: str
    image_chw: Tensor | None
    clip_id: str
    sample_index: int
    num_shown: int
    times: tuple[float, ...]
    augmentation: AugmentationKey
    keys: SampleKeys | None = None
    cached: CachedSample | None = None

    def pixels_tchw(self) -> Tensor:
        """Returns `video_tchw` of a sample that was read with its pixels."""
        assert self.video_tchw is not None, "the sample was read from the cache"
        return self.video_tchw

    def conditioning_image_chw(self) -> Tensor:
        """Returns the image that conditions the clip: the given one, else the first frame."""
        return self.pixels_tchw()[0] if self.image_chw is None else self.image_chw


def collate(samples: Sequence[VideoSample]) -> VideoBatch:
    """Stacks samples of one shape, all of them pixels or all of them encodings.

    Where only some samples carry an image, the others give their first frame.
    """
    encoded = [sample.cached for sample in samples if sample.cached is not None]
    assert len(encoded) in (0, len(samples)), "a batch is read from the cache as a whole, or not at all"
    video, image = (None, None) if encoded else _stack_pixels(samples)
    return VideoBatch(
        video_btchw=video,
        captions=tuple(sample.caption for sample in samples),
        image_bchw=image,
        clip_ids=tuple(sample.clip_id for sample in samples),
        sample_indices=tuple(sample.sample_index for sample in samples),
        num_shown=tuple(sample.num_shown for sample in samples),
        cached=cat_cached(encoded) if encoded else None,
        augmentations=tuple(sample.augmentation for sample in samples),
        keys=tuple(sample.keys for sample in samples if sample.keys is not None),
    )


def cat_cached(samples: Sequence[CachedSample]) -> CachedSample:
    """Joins encodings along the batch."""
    if len(samples) == 1:
        return samples[0]
    joined: dict[str, Any] = {}
    for field in fields(CachedSample):
        column = [getattr(sample, field.name) for sample in samples]
        joined[field.name] = None if column[0] is None else torch.cat(column)
    return CachedSample(**joined)


def _stack_pixels(samples: Sequence[VideoSample]) -> tuple[Tensor, Tensor | None]:
    shapes = {tuple(sample.pixels_tchw().shape) for sample in samples}
    assert len(shapes) == 1, (
        f"a batch holds one shape, got {sorted(shapes)}: who plans batches must see to it"
    )
    has_image = any(sample.image_chw is not None for sample in samples)
    images = [sample.conditioning_image_chw() for sample in samples]
    video = torch.stack([sample.pixels_tchw() for sample in samples])
    return video, torch.stack(images) if has_image else None

"""The base of all conditions: from a sample to its cached encoding to inputs of the transformer."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat_train.data.batches import VideoSample
from sat_train.encoding.cache.entries import CacheEntry, SampleFacts
from sat_train.encoding.cache.key import digest
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.models.encoders import Encoders

Encoding = Mapping[str, Tensor]


@dataclass(frozen=True)
class DitInputs:
    """Inputs of the transformer next to the noised latent, batch first.

    Args:
        text_bld: Text embeddings.
        image_latent_btchw: Latent concatenated to the noised one on channels, of its shape.
        ofs_b: The `ofs` input of CogVideoX1.5-I2V.
        extras: Named tensors for network modules.
    """

    text_bld: Tensor | None = None
    image_latent_btchw: Tensor | None = None
    ofs_b: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def merged(parts: Iterable[DitInputs]) -> DitInputs:
        """Returns the inputs of several conditions together; no two may set the same one."""
        inputs: dict[str, Tensor] = {}
        for part in parts:
            own = part.tensors()
            both = sorted(inputs.keys() & own.keys())
            assert not both, f"two conditions set {both}"
            inputs |= own
        return DitInputs.of(inputs)

    @staticmethod
    def cat(parts: Sequence[DitInputs]) -> DitInputs:
        """Returns batches of inputs as one batch."""
        columns = [part.tensors() for part in parts]
        return DitInputs.of({name: torch.cat([column[name] for column in columns]) for name in columns[0]})

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> DitInputs:
        """Returns inputs from tensors by name: undoes `tensors`."""
        own = {each.name for each in fields(DitInputs)}
        extras = {name: tensor for name, tensor in tensors.items() if name not in own}
        return DitInputs(**{name: tensors[name] for name in tensors.keys() & own}, extras=extras)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the inputs that are set, extras included, by name."""
        inputs = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        assert not inputs.keys() & self.extras.keys(), f"extras {sorted(self.extras)} need other names"
        return {**inputs, **self.extras}

    def to(self, device: torch.device, dtype: torch.dtype) -> DitInputs:
        """Returns the inputs on a device and in a dtype, except for extras, which the transformer casts."""
        return DitInputs.of(
            {
                name: tensor.to(device) if name in self.extras else tensor.to(device, dtype)
                for name, tensor in self.tensors().items()
            }
        )


class Condition:
    """One input of the model. It owns no trainable weight.

    Attributes:
        name: Its key among the encodings of a sample.
        tensors: Names of the tensors that `encode` returns; empty where nothing of a sample is encoded.
        drop_probability: Share of the training samples in which it is dropped.
        drop_purpose: Key of the random numbers that choose these.
        guides: Guidance contrasts the prediction with one from which it is dropped.
        augments: `encode` draws random numbers (`sample.generator`).
        settings: Inputs of `encode` besides the sample, as JSON values.
    """

    name: str
    tensors: frozenset[str] = frozenset()
    drop_probability = 0.0
    drop_purpose = ""
    guides = False
    augments = False
    settings: Mapping[str, Any] = {}

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Encodes one sample for the cache, without batch dimension."""
        return {}

    def entry(self, facts: SampleFacts) -> CacheEntry:
        """Returns the cache entry of a sample's encoding, keyed by all its inputs.

        By default these are the clip's pixels, its caption, the settings, the source file of the condition
        and, where it augments, the augmentation.
        """
        key = digest(
            kind="condition",
            name=self.name,
            settings=dict(self.settings),
            source=self._source,
            pixels=facts.clip.key,
            caption=facts.caption,
            noise=list(facts.view) if self.augments and facts.training else None,
        )
        return CacheEntry(key, replace(facts.clip.info, kind=self.name.lower()))

    @functools.cached_property
    def _source(self) -> str:
        """SHA-256 of its source file; the same for all samples."""
        return hashlib.sha256(Path(inspect.getfile(type(self))).read_bytes()).hexdigest()

    def drop(self, encoded: Encoding, dropped_b: Tensor) -> Encoding:
        """Drops the condition from samples of a batch: in training, and for guidance.

        Args:
            encoded: Its encoding, batch first.
            dropped_b: bool, True at samples without the condition.

        Returns:
            The encoding, by default with zeros for those samples.
        """
        return {
            name: tensor.masked_fill(dropped_b.view(-1, *[1] * (tensor.dim() - 1)), 0)
            for name, tensor in encoded.items()
        }

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Turns the encoding of a batch into inputs of the transformer.

        Args:
            encoded: Its encoding, batch first, on the device.
            random: Random numbers of the samples.
            latent_shape: Of the noised latent, (b, t, c, h, w).
        """
        return DitInputs()

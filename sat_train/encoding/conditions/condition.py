"""The base of all conditions: from a sample over what the cache keeps to inputs of the transformer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sat_train.data.batch import VideoSample
from sat_train.encoding.cache.entries import CacheEntry, SampleFacts
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.models.encoders import Encoders

Encoding = Mapping[str, Tensor]


@dataclass(frozen=True)
class DitInputs:
    """Inputs of the transformer next to the noised latent, batch first.

    Args:
        text_bld: Text embeddings.
        image_latent_btchw: Latent that stands next to the noised one on channels, of its shape.
        ofs_b: The `ofs` input of CogVideoX1.5-I2V.
    """

    text_bld: Tensor | None = None
    image_latent_btchw: Tensor | None = None
    ofs_b: Tensor | None = None

    @staticmethod
    def merged(parts: Iterable[DitInputs]) -> DitInputs:
        """Returns the inputs of several conditions together; no two may give the same one."""
        given: dict[str, Tensor] = {}
        for part in parts:
            twice = given.keys() & part.given().keys()
            assert not twice, f"two conditions give {sorted(twice)}"
            given |= part.given()
        return DitInputs(**given)

    @staticmethod
    def cat(parts: Sequence[DitInputs]) -> DitInputs:
        """Returns batches of inputs as one batch."""
        names = parts[0].given()
        return DitInputs(**{name: torch.cat([part.given()[name] for part in parts]) for name in names})

    def to(self, device: torch.device, dtype: torch.dtype) -> DitInputs:
        """Returns the inputs on a device and in a dtype."""
        return DitInputs(**{name: tensor.to(device, dtype) for name, tensor in self.given().items()})

    def given(self) -> dict[str, Tensor]:
        """Returns the inputs that there are, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


class Condition:
    """One input of the model. It owns no weight that trains.

    Attributes:
        name: Its key among the encodings of a sample.
        tensors: Names of what `encode` returns; empty where nothing of a sample is encoded.
        drop_probability: Share of the training samples that go without it.
        drop_purpose: Key of the random numbers that choose those.
        guides: Guidance contrasts the prediction with one that goes without it.
    """

    name: str
    tensors: frozenset[str] = frozenset()
    drop_probability = 0.0
    drop_purpose = ""
    guides = False

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Encodes one sample: what the cache keeps, without batch dimension."""
        return {}

    def entry(self, facts: SampleFacts) -> CacheEntry:
        """Returns where the encoding of a sample belongs in the cache, by everything that it depends on."""
        raise NotImplementedError(f"{self.name} encodes nothing")

    def drop(self, encoded: Encoding, dropped_b: Tensor) -> Encoding:
        """Replaces samples of a batch by those without the condition: in training, and for guidance.

        Args:
            encoded: Its encoding, batch first.
            dropped_b: bool, which samples.
        """
        return encoded

    def inputs(self, encoded: Encoding, random: Randomness, latent_shape: Sequence[int]) -> DitInputs:
        """Turns the encoding of a batch into inputs of the transformer.

        Args:
            encoded: Its encoding, batch first, on the device.
            random: Random numbers of the samples.
            latent_shape: Of the noised latent, (b, t, c, h, w).
        """
        return DitInputs()

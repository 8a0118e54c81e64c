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
import torch.nn.functional as F
from torch import Tensor

from sat_train.config.geometry import LatentShape
from sat_train.config.parts.reference import field_names
from sat_train.config.values import map_texts
from sat_train.data.batches import VideoSample
from sat_train.distributed.transfer import to_device
from sat_train.encoding.cache.entries import CacheEntry, SampleFacts
from sat_train.encoding.cache.key import digest
from sat_train.encoding.conditions.declared import declared_encoders, declared_sample
from sat_train.encoding.conditions.latent_time import How, pad_in_time, to_latent_frames
from sat_train.encoding.conditions.randomness import Randomness
from sat_train.errors import SatTrainError
from sat_train.models.encoders import Encoders

Encoding = Mapping[str, Tensor]


# inputs that several conditions may set, by the dimension on which they stand behind each other
_JOINED = {"channels_btchw": 2, "frames_bfchw": 1, "frame_index_f": 0, "frame_level_bf": 1}
_SHARED = "frame_index_f"  # the batch has one
_CLEAN = -1


@dataclass(frozen=True)
class DitInputs:
    """Inputs of the transformer next to the noised latent, batch first.

    Args:
        text_bld: Text embeddings.
        image_latent_btchw: Latent concatenated to the noised one on channels, of its shape.
        ofs_b: The `ofs` input of CogVideoX1.5-I2V.
        channels_btchw: Channels next to these. Those of several conditions stand in their order.
        frames_bfchw: Latent frames that stand behind the video in time: attention reads them, and they are
            not predicted. They have all channels of the input, or the first of them.
        frame_index_f: Their times in latent frames, int64 on the CPU; 0 is that of the first frame. They may
            repeat, and be those of frames of the video. The batch shares them.
        frame_level_bf: Their timesteps, int64, -1 for exactly clean; None: all are clean.
        extras: Named tensors for network modules.
    """

    text_bld: Tensor | None = None
    image_latent_btchw: Tensor | None = None
    ofs_b: Tensor | None = None
    channels_btchw: Tensor | None = None
    frames_bfchw: Tensor | None = None
    frame_index_f: Tensor | None = None
    frame_level_bf: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frames, index, level = self.frames_bfchw, self.frame_index_f, self.frame_level_bf
        assert (frames is None) == (index is None), "frames_bfchw and frame_index_f belong together"
        if frames is not None and index is not None:
            count = frames.shape[1]
            assert index.shape == (count,), f"{count} frames at the times {index.tolist()}"
            assert level is None or level.shape == frames.shape[:2], f"a level for each of {count} frames"

    @staticmethod
    def merged(parts: Iterable[DitInputs]) -> DitInputs:
        """Returns the inputs of several conditions together.

        Channels and appended frames of several stand behind each other; no two may set any other input.
        """
        inputs: dict[str, Tensor] = {}
        for part in parts:
            own = part.tensors()
            if part.frames_bfchw is not None:  # another condition may append frames that are not clean
                own.setdefault("frame_level_bf", torch.full(part.frames_bfchw.shape[:2], _CLEAN))
            both = sorted(inputs.keys() & own.keys() - _JOINED.keys())
            assert not both, f"two conditions set {both}"
            inputs |= {name: _joined(name, inputs.get(name), tensor) for name, tensor in own.items()}
        return DitInputs.of(inputs)

    @staticmethod
    def cat(parts: Sequence[DitInputs]) -> DitInputs:
        """Returns batches of inputs as one batch."""
        columns = [part.tensors() for part in parts]
        joined = {
            name: tensor if name == _SHARED else torch.cat([column[name] for column in columns])
            for name, tensor in columns[0].items()
        }
        return DitInputs.of(joined)

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

    def keywords(self) -> dict[str, Any]:
        """Returns the inputs except for text as keyword arguments of the transformer, those that are set."""
        own = {name: tensor for name, tensor in self.tensors().items() if name not in self.extras}
        own.pop("text_bld", None)
        return {**own, **({"extras": self.extras} if self.extras else {})}

    def to(self, device: torch.device, dtype: torch.dtype) -> DitInputs:
        """Returns the inputs on a device and in a dtype.

        The transformer casts extras. Whole numbers keep their dtype, and the times of frames their place.
        """

        def placed(name: str, tensor: Tensor) -> Tensor:
            if name == _SHARED:
                return tensor
            is_cast = tensor.is_floating_point() and name not in self.extras
            moved = to_device(tensor, device)
            return moved.to(dtype) if is_cast else moved

        return DitInputs.of({name: placed(name, tensor) for name, tensor in self.tensors().items()})


def _joined(name: str, first: Tensor | None, second: Tensor) -> Tensor:
    if first is None:
        return second
    if name == "frames_bfchw":  # channels that one of them lacks are zero
        channels = max(first.shape[2], second.shape[2])
        first, second = (F.pad(each, (0, 0, 0, 0, 0, channels - each.shape[2])) for each in (first, second))
    return torch.cat([first, to_device(second, first.device)], dim=_JOINED[name])


class Condition:
    """One input of the model. It owns no trainable weight.

    Args:
        params: The part's parameter record.
        model: The model's description, a `ModelSpec`.

    Attributes:
        name: Its key among the encodings of a sample.
        tensors: Names of the tensors that `encode` returns; empty where nothing of a sample is encoded.
        drop_probability: Share of the training samples in which it is dropped.
        drop_purpose: Key of the random numbers that choose these.
        guides: Guidance contrasts the prediction with one from which it is dropped.
        augments: `encode` differs between training and validation, or draws (`sample.generator`).
        reads_caption: `encode` reads `sample.caption`.
        encodes_text: `encode` calls the text encoder.
    """

    params: Any = None
    model: Any = None
    name: str = ""
    tensors: frozenset[str] = frozenset()
    drop_probability = 0.0
    drop_purpose = ""
    guides = False
    augments = False
    reads_caption = True
    encodes_text = False
    _is_loaded = False

    def __init__(self, params: Any = None, model: Any = None) -> None:
        self.params, self.model = params, model

    @property
    def training_only(self) -> bool:
        """Sampling does without it."""
        return self.params is not None and self.params.training_only

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that its settings refer to, sorted."""
        return () if self.params is None else field_names(self.params)

    @property
    def adds_rows(self) -> bool:
        """True where it holds videos that lost against the clip, which join the batch as rows."""
        return self.params is not None and bool(self.params.adds_rows)

    # What an extension overrides

    def load(self, device: torch.device) -> None:
        """Loads frozen encoders of its own: once, and only where a sample must be encoded."""

    def encode(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Encodes one sample for the cache, without batch dimension.

        What it reads is the key of the cache: pixels and the fields that its settings name always, all else
        as declared by the attributes. Reading more is an error.
        """
        return {}

    def drop(self, encoded: Encoding, dropped_b: Tensor) -> Encoding:
        """Drops the condition from samples of a batch: in training, and for guidance.

        Args:
            encoded: Its encoding, batch first.
            dropped_b: bool, True at samples without the condition.

        Returns:
            The encoding, by default with zeros for those samples; a posterior becomes one whose samples are
            exactly zero.
        """
        return {
            name: tensor.masked_fill(
                dropped_b.view(-1, *[1] * (tensor.dim() - 1)), -torch.inf if name == "logvar" else 0
            )
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

    # Helpers

    def latent(self, encoded: Encoding, random: Randomness, purpose: str | None = None) -> Tensor:
        """Draws latents from `mean` and `logvar`: scaled, and padded in time, like those of the clips.

        Args:
            encoded: Posterior moments, batch first.
            random: Random numbers of the samples.
            purpose: Key of the numbers; None: the condition's own, so that no two latents share noise.

        Returns:
            float32 `[b, t, c, h, w]`.
        """
        latent = self.model.latent_scale * random.latent(encoded, purpose or f"condition.{self.name}")
        return pad_in_time(latent, self.model)

    def latent_frames(self, x_t: Tensor, how: How) -> Tensor:
        """Turns values of pixel frames into values of latent frames, see `to_latent_frames`."""
        return to_latent_frames(x_t, how, self.model)

    def latent_shape(self, sample: VideoSample) -> LatentShape:
        """Returns the shape of the latent of a sample's clip; of a prompt, that of the video to come."""
        frames = max(len(sample.video_tchw), sample.num_shown)  # a prompt may come with the first ones
        shape: LatentShape = self.model.latent(frames, *sample.video_tchw.shape[-2:])
        return shape

    # What the stages call

    def encoded(self, sample: VideoSample, encoders: Encoders) -> dict[str, Tensor]:
        """Encodes one sample as declared.

        Raises:
            SatTrainError: `encode` reads more than the condition declares, or returns other tensors.
        """
        if not self._is_loaded:
            with torch.random.fork_rng():  # the run's own random numbers stay
                self.load(encoders.device)
            self._is_loaded = True
        tensors = self.encode(declared_sample(sample, self), declared_encoders(encoders, self))
        if tensors.keys() != self.tensors:
            raise SatTrainError(
                f"condition '{self.name}': encode returns {sorted(tensors)}",
                expected=f"the tensors that its class declares: {sorted(self.tensors)}",
            )
        return tensors

    def entry(self, facts: SampleFacts) -> CacheEntry:
        """Returns the cache entry of a sample's encoding, keyed by all its inputs.

        These are the clip's pixels, with the autoencoder, the settings, the source files of the condition
        and, where it has or declares them: the conditioning image, the fields, the files of weights, the
        caption, the text encoder and the augmentation.
        """
        key = digest(
            kind="condition",
            name=self.name,
            settings=self._settings(facts),
            source=self._source,
            pixels=facts.clip.key,
            caption=facts.caption if self.reads_caption else None,
            noise=list(facts.view) if self.augments and facts.training else None,
            **self._further_facts(facts),
        )
        return CacheEntry(key, replace(facts.clip.info, kind=self.name.lower()))

    def _settings(self, facts: SampleFacts) -> dict[str, Any]:
        """Returns its settings, with the content of a file of weights in place of its path."""
        if self.params is None:
            return {}
        files = facts.encoder_digests.files
        settings: dict[str, Any] = map_texts(
            self.params.model_dump(mode="json"), lambda text: files.get(text, text)
        )
        return settings

    def _further_facts(self, facts: SampleFacts) -> dict[str, Any]:
        """Returns the inputs that not every condition has: the keys of those without stay the same."""
        further: dict[str, Any] = {}
        if facts.record.image is not None:
            further["image"] = facts.picture(facts.record.image).key
        if self.fields:
            further["fields"] = {name: facts.field(name) for name in self.fields}
        if self.encodes_text:
            further["text"] = facts.encoder_digests.text
        return further

    @functools.cached_property
    def _source(self) -> str:
        """SHA-256 of the source files of its class and of the classes between it and this one."""
        classes = [each for each in type(self).__mro__ if issubclass(each, Condition)][:-1]
        files = dict.fromkeys(inspect.getfile(each) for each in classes)
        return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()

"""Encoding of batches between data and objective, for samples that are not encoded yet.

A sample is encoded by itself, with or without a cache, in the dtype that the encoders compute in. So a loss
from the cache equals a loss without it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sat_train.data.batches import LoadedBatch, Sample, SampleBatch, VideoSample
from sat_train.encoding.cache.entries import CacheEntry
from sat_train.encoding.cache.write_behind import WriteBehind
from sat_train.encoding.conditions.condition import Condition
from sat_train.encoding.conditions.text import TextCondition
from sat_train.encoding.encoded_batch import CLIP, EncodedBatch, EncodedSample, stack_rows, stack_samples
from sat_train.encoding.encoded_dataset import UnencodedSample
from sat_train.models.encoders import Encoders


class Encode:
    """Turns batches of the loader into batches of encodings.

    Args:
        encoders: The frozen models.
        conditions: Conditions whose encodings belong to a sample.
    """

    def __init__(self, encoders: Encoders, conditions: Sequence[Condition]) -> None:
        self._encoders = encoders
        self._conditions = {each.name: each for each in conditions if each.tensors}

    def __call__(self, batch: LoadedBatch) -> EncodedBatch:
        """Returns a batch with encodings in place of pixels; one from the cache is returned unchanged."""
        if isinstance(batch, EncodedBatch):
            return batch
        assert isinstance(batch, SampleBatch), f"a loader yields no {type(batch).__name__}"
        samples = [self.sample(sample).to(self._encoders.device) for sample in batch.samples]
        return stack_samples(samples, batch.step_positions)

    def condition(self, name: str, batch: LoadedBatch) -> dict[str, Tensor]:
        """Returns the encoding of one condition of a batch alone, batch first."""
        if isinstance(batch, EncodedBatch):
            return {part: tensor.to(self._encoders.device) for part, tensor in batch.encodings[name].items()}
        assert isinstance(batch, SampleBatch), f"a loader yields no {type(batch).__name__}"
        samples = [
            sample.encodings[name] if isinstance(sample, EncodedSample) else self._part(name, sample)
            for sample in batch.samples
            if isinstance(sample, EncodedSample | VideoSample)
        ]
        device = self._encoders.device
        return {part: stack_rows([each[part].to(device) for each in samples]) for part in samples[0]}

    def sample(self, sample: Sample) -> EncodedSample:
        """Returns a sample encoded; one from the cache is returned unchanged."""
        if isinstance(sample, EncodedSample):
            return sample
        assert isinstance(sample, VideoSample), f"a loader yields no {type(sample).__name__}"
        return self._encode(sample)

    def _encode(self, sample: VideoSample) -> EncodedSample:
        encodings = {name: self._part(name, sample) for name in (CLIP, *self._conditions)}
        return EncodedSample(sample.clip_id, sample.sample_index, sample.num_shown, encodings)

    def _part(self, name: str, sample: VideoSample) -> dict[str, Tensor]:
        if name == CLIP:
            return self._encoders.video(sample.video_tchw, subject=sample.clip_id)
        return self._conditions[name].encoded(sample, self._encoders)


class EncodeAndKeep(Encode):
    """Encodes, and hands new encodings to the writer of the cache.

    Args:
        encoders: The frozen models.
        conditions: Conditions whose encodings belong to a sample.
        writer: Receives the entries.
        is_there: Whether the cache holds an entry already, by its key.
    """

    def __init__(
        self,
        encoders: Encoders,
        conditions: Sequence[Condition],
        *,
        writer: WriteBehind,
        is_there: Callable[[str], bool],
    ) -> None:
        super().__init__(encoders, conditions)
        self.writer, self._is_there = writer, is_there

    def _encode(self, sample: VideoSample) -> EncodedSample:
        encoded = super()._encode(sample)
        assert isinstance(sample, UnencodedSample), "a sample for the cache carries its entries"
        for name, entry in sample.entries.items():
            if self._is_new(entry):
                self.writer.add(entry.key, encoded.encodings[name], entry.info)
        return encoded

    def keep(self, batch: SampleBatch) -> int:
        """Encodes the new entries of a batch, except captions, and keeps them; returns their number."""
        new = [
            (sample, name, entry)
            for sample in batch.samples
            if isinstance(sample, UnencodedSample)
            for name, entry in sample.entries.items()
            if name != TextCondition.name and self._is_new(entry)
        ]
        for sample, name, entry in new:
            self.writer.add(entry.key, self._part(name, sample), entry.info)
        return len(new)

    def keep_caption(self, entry: CacheEntry) -> None:
        """Encodes a caption, which is the name of its entry, and keeps it."""
        self.writer.add(entry.key, {"text": self._encoders.text(entry.info.name)}, entry.info)

    def keep_captions(self, entries: Sequence[CacheEntry]) -> None:
        """Encodes captions together, and keeps them."""
        texts_bld = self._encoders.texts([entry.info.name for entry in entries])
        for entry, text_ld in zip(entries, texts_bld, strict=True):
            self.writer.add(entry.key, {"text": text_ld}, entry.info)

    def _is_new(self, entry: CacheEntry) -> bool:
        return entry.key not in self.writer and not self._is_there(entry.key)

"""The encoding stage of a run: reads samples from the cache, and encodes the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sat_train.data.dataset import VideoDataset
from sat_train.data.loader import OrderedLoader, SampleReader
from sat_train.distributed.collectives import check_all_ranks, gather_objects
from sat_train.distributed.processes import ProcessMesh
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.index import OpenCache
from sat_train.encoding.cache.shards import ShardWriter
from sat_train.encoding.conditions.condition import Condition
from sat_train.encoding.conditions.text import text_entry
from sat_train.encoding.digests import share_files
from sat_train.encoding.encode import Encode, EncodeAndKeep
from sat_train.encoding.encoded_dataset import EncodedDataset
from sat_train.encoding.missing import find_missing
from sat_train.errors import DataError
from sat_train.models.encoders import Encoders

_SHOWN = 5  # clips in one message


@dataclass(frozen=True)
class EncodingStage:
    """Encodes a run's samples: all of them, or those that the cache lacks, which it may then add to it.

    Args:
        encoders: The frozen models.
        conditions: The conditions of the model.
        cache: The open cache; None encodes everything.
        keeps: New encodings are added to the cache.
        needs_empty_prompt: The run reads the embedding of the empty prompt.
        shard_bytes: Size at which a shard is published.
    """

    encoders: Encoders
    conditions: Sequence[Condition]
    cache: OpenCache | None
    keeps: bool
    needs_empty_prompt: bool
    shard_bytes: int

    @property
    def headers(self) -> FileMetadata | None:
        """Known headers of clips."""
        return None if self.cache is None else self.cache.file_metadata

    def reader(self, videos: VideoDataset) -> SampleReader:
        """Returns the reader of a data set's samples."""
        return videos if self.cache is None else EncodedDataset(videos, self.cache, self.conditions)

    def build_encode(self, mesh: ProcessMesh) -> Encode:
        """Builds the encoder of batches.

        Of ranks that see the same samples only the first one adds them to the cache.
        """
        cache = self.cache
        if cache is None or not self.keeps:
            return Encode(self.encoders, self.conditions)
        trains = cache.use != "write"  # a full disk does not end the training
        encode = EncodeAndKeep(
            self.encoders,
            self.conditions,
            writer=ShardWriter(cache.folder, rank=mesh.rank, shard_bytes=self.shard_bytes, waits=trains),
            is_there=lambda key: mesh.model_rank > 0 or cache.index.is_whole(key),
        )
        if trains and mesh.model_rank == 0 and not self._has_empty_prompt(cache):
            encode.keep_caption(text_entry("", cache.encoder_digests))
        return encode

    def check_complete(
        self, mesh: ProcessMesh, samples: Sequence[tuple[OrderedLoader, Sequence[int]]]
    ) -> bool:
        """Returns whether the cache holds all encodings of a run, which then needs no encoder.

        Args:
            mesh: The process mesh.
            samples: Loaders, each with the global indices of its remaining samples.

        Raises:
            DataError: Some are missing, and `data.cache` is `require`.

        Ranks: all; each checks its share, and then shares its hashes with the others.
        """
        cache = self.cache
        if cache is None:
            return False
        missing = []
        for loader, indices in samples:
            assert isinstance(loader.reader, EncodedDataset), "the loaders are built with the cache"
            missing += find_missing(loader.reader, indices[mesh.rank :: mesh.world_size])
        share_files(mesh, cache.file_metadata)
        clips = [clip for share in gather_objects(mesh, [each.clip_id for each in missing]) for clip in share]
        has_empty_prompt = self._has_empty_prompt(cache)
        is_complete = not clips and has_empty_prompt
        error = None
        if cache.use == "require" and not is_complete:
            count = sum(len(indices) for _, indices in samples)
            error = DataError(
                f"data.cache = require, and {len(clips)} of {count} samples, validation's included, "
                f"are not in {cache.folder}"
                + "".join(f"\n    {clip}" for clip in sorted(set(clips))[:_SHOWN])
                + ("" if has_empty_prompt else "\n    the empty prompt"),
                expected="all samples of the run, encoded with these files, settings and encoders",
                remedy="torchrun launch/precompute.py with the same --base and words, or data.cache=fill",
            )
        check_all_ranks(mesh, error)
        return is_complete

    def describe(self, *, is_complete: bool, samples_videos: bool) -> str:
        """Returns a log line about the use of the cache.

        Args:
            is_complete: The cache holds all encodings of the run.
            samples_videos: Validation samples videos, which needs both encoders.
        """
        assert self.cache is not None, "there is a cache to describe"
        if not is_complete:
            about = "not all samples are cached, the rest is encoded" + " and kept" * self.keeps
        elif samples_videos:
            about = "all samples are cached; T5 and the VAE are loaded because validation samples videos"
        else:
            about = "all samples are cached; neither T5 nor the VAE is loaded"
        return f"cache {self.cache.folder}: {about}"

    def _has_empty_prompt(self, cache: OpenCache) -> bool:
        return not self.needs_empty_prompt or text_entry("", cache.encoder_digests).key in cache.index


def read_empty_prompt(cache: OpenCache | None) -> Tensor | None:
    """Returns the embedding of the empty prompt, if there is a cache that has it."""
    if cache is None:
        return None
    tensors = cache.index.read(text_entry("", cache.encoder_digests).key)
    return None if tensors is None else tensors["text"]

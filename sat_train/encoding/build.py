"""Configuration -> the encoding stage of a run: its frozen encoders, its conditions and its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sat_train.config import ModelSpec, RunConfig
from sat_train.config.parts.condition_parts import ConditionConfig
from sat_train.data.dataset import VideoDataset
from sat_train.data.loader import OrderedLoader, SampleReader
from sat_train.distributed.collectives import check_all_ranks, gather_objects, in_turn_on_this_machine
from sat_train.distributed.processes import ProcessMesh
from sat_train.encoding.cache.file_metadata import FileMetadata
from sat_train.encoding.cache.index import OpenCache
from sat_train.encoding.cache.shards import ShardWriter
from sat_train.encoding.cache.write_behind import WriteBehind
from sat_train.encoding.conditions.condition import Condition
from sat_train.encoding.conditions.image import ImageCondition, OfsCondition
from sat_train.encoding.conditions.text import TextCondition, text_entry
from sat_train.encoding.digests import open_cache, share_files
from sat_train.encoding.encode import Encode, EncodeAndKeep
from sat_train.encoding.encoded_dataset import EncodedDataset, find_missing
from sat_train.encoding.text_weights import read_text_encoder
from sat_train.errors import DataError
from sat_train.interchange.locate import read_vae_weights
from sat_train.models.build import compute_dtype, encoder_dtype
from sat_train.models.encoders import Encoders
from sat_train.models.text.t5 import T5TextEncoder
from sat_train.models.vae.build import build_vae
from sat_train.models.vae.video_vae import VideoVAE
from sat_train.weights.names import check_names_and_shapes

# the value in diffusers' pipeline and CogVideo's sampling of CogVideoX1.5-I2V
_OFS = 2.0
_SHOWN = 5  # clips in one message

Mode = Literal["off", "read", "fill", "require", "write"]


def build_encoding(config: RunConfig, mesh: ProcessMesh, mode: Mode | None = None) -> EncodingStage:
    """Builds the stage that encodes a run's samples; the only reader of `data.cache`.

    Args:
        config: The configuration.
        mesh: The process mesh.
        mode: `write` fills the cache without reading it, for precompute; None uses `data.cache`.

    Raises:
        DataError: As `open_cache`.
        CheckpointError: Likewise.

    Ranks: all.
    """
    data = config.require_data()
    mode = mode or data.cache
    cache = None if mode == "off" else open_cache(config, mesh, "read" if mode == "fill" else mode)
    encoders = build_encoders(
        config, mesh.device, lambda: read_empty_prompt(cache), in_turn=turns_for_text(mesh)
    )
    return EncodingStage(
        encoders=encoders,
        conditions=build_conditions(config, encoders),
        cache=cache,
        keeps=mode in ("fill", "write"),
        needs_empty_prompt=config.model.null_condition == "empty_prompt",
        shard_bytes=int(data.cache_shard_mb * 1e6),
    )


def build_conditions(config: RunConfig, encoders: Encoders) -> tuple[Condition, ...]:
    """Builds the conditions of the model."""
    model, spec = config.model, config.spec
    text: Condition = TextCondition(
        null=model.null_condition,
        empty_prompt=encoders.empty_prompt,
        drop_probability=spec.caption_dropout,
    )
    conditions, own = [text], model.conditions
    if model.noised_image_input and not any(each.params.takes_image_slot for each in own.values()):
        image = ImageCondition(
            scale=spec.image_latent_scale,
            drop_probability=model.noised_image_dropout,
            noise_log_mean=model.noised_image_log_mean,
            noise_log_std=model.noised_image_log_std,
        )
        conditions.append(image)
    if spec.ofs_width is not None:
        conditions.append(OfsCondition(_OFS))
    conditions += [_build_own(name, choice, spec) for name, choice in sorted(own.items())]
    if (dropped := config.args.guidance_drops) is not None:
        for condition in conditions:
            condition.guides = condition.name in dropped
    return tuple(conditions)


def _build_own(name: str, choice: ConditionConfig, spec: ModelSpec) -> Condition:
    condition: Condition = choice.build(spec)
    condition.name, condition.params, condition.model = name, choice.params, spec
    condition.drop_probability = choice.drop
    condition.drop_purpose = condition.drop_purpose or f"condition_drop.{name}"
    return condition


def build_encoders(
    config: RunConfig,
    device: torch.device,
    known_empty_prompt: Callable[[], Tensor | None] = lambda: None,
    *,
    in_turn: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Encoders:
    """Builds the frozen encoders; none is loaded yet.

    Args:
        config: The configuration.
        device: Their device; T5 may be kept on the CPU (`args.text_encoder_device`).
        known_empty_prompt: Returns the embedding of the empty prompt, if it need not be encoded.
        in_turn: Waits for the turn of this rank to load the text encoder: `turns_for_text`.
    """

    text_device = torch.device("cpu") if config.args.text_encoder_device == "cpu" else device

    def load_text_encoder() -> T5TextEncoder:
        with in_turn():
            return build_loaded_text_encoder(config, text_device)

    return Encoders(
        load_vae=lambda: build_loaded_vae(config, device),
        load_text_encoder=load_text_encoder,
        geometry=config.spec,
        dtype=compute_dtype(config.args),
        device=device,
        text_device=text_device,
        known_empty_prompt=known_empty_prompt,
    )


def turns_for_text(mesh: ProcessMesh) -> Callable[[], AbstractContextManager[None]]:
    """Returns the turns in which the ranks of a machine load the text encoder: its weights pass through host
    memory, which then holds one copy.
    """
    return lambda: in_turn_on_this_machine(mesh, "T5")


def build_loaded_text_encoder(config: RunConfig, device: torch.device) -> T5TextEncoder:
    """Builds the text encoder with its weights."""
    text, dtype = config.spec.text, encoder_dtype(config.args)
    return read_text_encoder(text.model_dir, max_length=text.max_length, dtype=dtype, device=device)


def build_loaded_vae(config: RunConfig, device: torch.device) -> VideoVAE:
    """Builds the autoencoder with the weights of `first_stage_config.params.ckpt_path`."""
    spec, path = config.spec, config.spec.vae.ckpt_path
    state_dict = read_vae_weights(path)

    def check(outline: VideoVAE) -> None:
        check_names_and_shapes(
            {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()},
            {name: tuple(tensor.shape) for name, tensor in state_dict.items()},
            where=path,
        )

    return build_vae(
        spec, state_dict=state_dict, check=check, device=device, dtype=encoder_dtype(config.args)
    )


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

    @property
    def augments(self) -> bool:
        """An encoding of a clip's window differs from view to view."""
        return any(each.augments for each in self.conditions)

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
        shards = ShardWriter(cache.folder, rank=mesh.rank, shard_bytes=self.shard_bytes, waits=trains)
        encode = EncodeAndKeep(
            self.encoders,
            self.conditions,
            writer=WriteBehind(shards),
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
            about = "all samples are cached; T5 and the VAE are loaded for args.valid_video_interval"
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

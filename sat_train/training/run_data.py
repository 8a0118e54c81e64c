"""Config -> the training data of a run: its loaders, and whether it needs the encoders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sat_train.checkpoint.find import ResumePoint
from sat_train.config import RunConfig
from sat_train.config.facts import ClipCounts, RunFacts
from sat_train.config.schema.encoder_slots import T5TextEncoderParams
from sat_train.data.batches import DataPosition
from sat_train.data.build import build_train_loader, build_valid_loader, count_steps
from sat_train.data.loader import OrderedLoader
from sat_train.distributed.collectives import on_rank_0
from sat_train.distributed.processes import ProcessMesh
from sat_train.encoding.build import EncodingStage, build_encoding
from sat_train.encoding.digests import digest_part_files
from sat_train.encoding.encode import Encode
from sat_train.encoding.encoded_batch import EncodedBatch
from sat_train.errors import CheckpointError
from sat_train.log import get_logger
from sat_train.models.text.tokenizer import count_tokens
from sat_train.training.resume import check_part_files

log = get_logger(__name__)

_CLIPS_COUNTED = 1000  # whose captions are counted, spread over the data


@dataclass(frozen=True)
class RunData:
    """Training and validation data of a run.

    Args:
        train: Endless loader of this rank.
        valid: Loader of the validation batches; None for a run that does not validate.
        train_iters: Steps of the run.
        needs_encoders: T5 and the autoencoder must be loaded.
        is_cached: The cache holds all encodings of the run: encoders serve validation videos only.
        encoding: Encodes the samples.
        text: Folder of the text encoder, and tokens of a caption.
        part_files: Hashes of the files of weights that parts name, by path.
    """

    train: OrderedLoader
    valid: OrderedLoader | None
    train_iters: int
    needs_encoders: bool
    is_cached: bool
    encoding: EncodingStage
    text: T5TextEncoderParams
    part_files: Mapping[str, str]

    def first_sample(self) -> EncodedBatch:
        """Returns the first sample of the run, encoded; the same on all ranks."""
        index = self.train.batches.indices(self.train.position, 1)[0]
        reader = self.train.dataset if self.needs_encoders else self.train.reader
        sample = self.train.dataset.read(index, reader.sample).sample
        return Encode(self.encoding.encoders, self.encoding.conditions)(reader.collate([sample]))

    def facts(self, mesh: ProcessMesh) -> RunFacts:
        """Returns the facts of the run beyond its configuration; those of the captions on rank 0."""
        clips = [0 if loader is None else _count_clips(loader) for loader in (self.train, self.valid)]
        is_gpu = mesh.device.type == "cuda"
        return RunFacts(
            clips=ClipCounts(*clips),
            data_ranks=mesh.data_size,
            steps=self.train_iters,
            card_gib=torch.cuda.get_device_properties(mesh.device).total_memory / 2**30 if is_gpu else None,
            long_captions=self._long_captions() if mesh.rank == 0 else None,
        )

    def _long_captions(self) -> float | None:
        """Returns the share of the captions that the text encoder truncates; None without a tokenizer."""
        sources = self.train.dataset.sources
        every = -(-sum(map(len, sources)) // _CLIPS_COUNTED) or 1
        records = [record for source in sources for record in source.records[::every]]
        sample = [caption for record in records for caption in record.captions]
        try:
            counts = count_tokens(Path(self.text.model_dir), sample)
        except CheckpointError:
            return None
        return sum(count > self.text.max_length for count in counts) / max(1, len(sample))


def open_data(
    config: RunConfig,
    mesh: ProcessMesh,
    *,
    point: ResumePoint | None = None,
    run_directory: Path | None = None,
) -> RunData:
    """Builds the loaders, and checks whether the cache holds all samples of the run.

    Args:
        config: The configuration.
        mesh: The process mesh.
        point: The checkpoint that the run resumes; None for a new run.
        run_directory: Receives the names of bad clips; None: they are only logged.

    Raises:
        DataError: No usable data, or `data.cache: require` and something is missing.
        CheckpointError: A file of weights differs from that of the checkpoint.

    Ranks: all.
    """
    encoding = build_encoding(config, mesh)
    part_files = on_rank_0(mesh, lambda: digest_part_files(config, encoding.cache), may_take_long=True)
    if point is not None and part_files:
        on_rank_0(mesh, lambda: check_part_files(point, part_files))
    train = build_train_loader(
        config,
        mesh,
        start=position_of(point),
        run_directory=run_directory,
        headers=encoding.headers,
        reader_of=encoding.reader,
    )
    if point is not None and point.manifest.data_fingerprint != train.fingerprint:
        log.warning(
            "the training data differ from those of the checkpoint (fingerprint %s, was %s): the run "
            "continues at sample %d of the new order, which may repeat or miss clips in this epoch",
            *(train.fingerprint, point.manifest.data_fingerprint, train.position.consumed),
        )
    valid = None
    if config.args.eval_interval is not None:
        valid = build_valid_loader(
            config, mesh, run_directory=run_directory, headers=encoding.headers, reader_of=encoding.reader
        )
    train_iters = count_steps(config, train.batches, 0 if point is None else point.step)
    needs_encoders, is_complete = True, False
    if encoding.cache is not None:
        steps = train_iters - (point.step if point is not None else 0)
        micro_steps = max(0, steps) * config.args.gradient_accumulation_steps
        samples = [(train, train.batches.indices(train.position, micro_steps))]
        if valid is not None:
            samples.append((valid, valid.batches.indices(valid.batches.start)))
        is_complete = encoding.check_complete(mesh, samples)
        needs_encoders = not is_complete or samples_videos(config)
        summary = encoding.describe(is_complete=is_complete, samples_videos=samples_videos(config))
        log.info("%s", summary)
    return RunData(
        train, valid, train_iters, needs_encoders, is_complete, encoding, config.spec.text, part_files
    )


def position_of(point: ResumePoint | None) -> DataPosition:
    """Returns a run's position in the data when it resumes a checkpoint, or starts."""
    if point is None:
        return DataPosition()
    waiting = point.manifest.samples_waiting
    return DataPosition(point.manifest.samples_consumed + len(waiting), waiting)


def samples_videos(config: RunConfig) -> bool:
    """Returns whether validation samples videos, which needs both encoders."""
    return config.args.eval_interval is not None and config.args.valid_video_interval is not None


def _count_clips(loader: OrderedLoader) -> int:
    return sum(len(source) for source in loader.dataset.sources)

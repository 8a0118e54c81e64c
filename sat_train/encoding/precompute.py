"""Encoding of all samples of a run in advance, on any number of ranks; it can be stopped and continued."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from sat_train.config import RunConfig
from sat_train.data.batches import QueuedBatches, SampleBatch
from sat_train.data.build import (
    build_loader,
    build_train_batches,
    build_train_dataset,
    build_valid_dataset,
    count_steps,
)
from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.dataset import VideoDataset
from sat_train.data.failure_log import ClipFailure
from sat_train.distributed.collectives import gather_objects
from sat_train.distributed.lack_of_memory import PRECOMPUTE_REMEDY, explaining_lack_of_memory
from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.signals import StopRequest
from sat_train.distributed.work_queue import WorkQueue, gather_after_work
from sat_train.encoding.build import EncodingStage, build_encoding
from sat_train.encoding.cache.entries import CacheEntry
from sat_train.encoding.cache.index import OpenCache
from sat_train.encoding.cache.shards import EntryInfo
from sat_train.encoding.conditions.text import others_encode_text, text_entry
from sat_train.encoding.digests import share_files
from sat_train.encoding.encode import EncodeAndKeep
from sat_train.encoding.encoded_batch import CLIP
from sat_train.encoding.encoded_dataset import EncodedDataset, MissingEncodings, drop_repeated, find_missing
from sat_train.encoding.work_progress import WorkProgress
from sat_train.errors import Stopped
from sat_train.log import get_logger
from sat_train.models.encoders import captions_at_once

log = get_logger(__name__)


@dataclass(frozen=True)
class _Work:
    """The samples to encode of one data set.

    Args:
        dataset: The data set.
        indices: Samples with missing encodings, of all ranks.
        num_samples: Samples inspected.
        queue: Hands out positions in `indices`.
    """

    dataset: EncodedDataset
    indices: tuple[int, ...]
    num_samples: int
    queue: WorkQueue


def precompute_until_stopped(config: RunConfig, mesh: ProcessMesh) -> None:
    """Runs `precompute`; a signal ends it after the current clip.

    Raises:
        Stopped: It was stopped before all was encoded.
        SatTrainError: As `precompute`.

    Ranks: all.
    """
    request = StopRequest("stopped before the first clip was encoded; run it again", unit="clip")
    precompute(config, mesh, stop_request=request.listen())


def precompute(config: RunConfig, mesh: ProcessMesh, *, stop_request: StopRequest | None = None) -> None:
    """Encodes clips, first frames and captions of training and validation that are not in the cache yet.

    Raises:
        SatTrainError: No usable data or weights, too many bad clips, or a full disk.
        Stopped: It was asked to stop.

    Ranks: all.
    """
    for note in config.notes:
        log.info("%s", note)
    stage = build_encoding(config, mesh, "write")
    cache, encode = stage.cache, stage.build_encode(mesh)
    assert cache is not None, "it is written"
    assert isinstance(encode, EncodeAndKeep), "it is written"
    works = [
        _find_work(mesh, name, EncodedDataset(videos, cache, stage.conditions), samples)
        for name, videos, samples in _datasets(config, mesh, cache, augments=stage.augments)
    ]
    captions = _captions(config, cache, works)
    num_missing, num_samples = sum(len(w.indices) for w in works), sum(w.num_samples for w in works)
    log.info(
        "cache %s: %d of %d samples and %d captions to encode",
        *(cache.folder, num_missing, num_samples, len(captions)),
    )
    if num_missing or captions:
        encode.writer.check_folder()
    if stop_request is not None:
        stop_request.defer()
    encoding = _Encoding(config, mesh, stage, encode, works, captions, stop_request)
    with explaining_lack_of_memory(PRECOMPUTE_REMEDY):
        encoding.run()
    counts = gather_after_work(mesh, (encoding.encoded, encoding.failed, bool(stop_request)))
    log.info(
        "cache %s: %d entries encoded, %d samples reused, %d clips failed",
        *(
            cache.folder,
            sum(c[0] for c in counts),
            num_samples - num_missing,
            len(set().union(*(c[1] for c in counts))),
        ),
    )
    if any(stopped for _, _, stopped in counts):
        message = "stopped: finished samples are kept; run the command again to continue"
        raise Stopped(signal.SIGINT, message, ranks_agree=True)


def _datasets(
    config: RunConfig, mesh: ProcessMesh, cache: OpenCache, *, augments: bool
) -> list[tuple[str, VideoDataset, Sequence[int]]]:
    """Returns the data sets, each with a name and its samples to encode.

    Where clips have a limited number of views, these are all views of all clips, whatever the run's length
    and world size; else the samples that a run of this configuration on as many ranks will train on.
    """
    params = config.require_data().params
    is_limited = params.views is not None or (params.window in ("head", "center") and not augments)
    train = build_train_dataset(config, mesh, headers=cache.file_metadata, each_view_once=is_limited)
    if is_limited:
        samples: Sequence[int] = range(len(train) * (params.views or 1))
    else:
        batches = build_train_batches(config, mesh, train)
        micro_steps = count_steps(config, batches) * config.args.gradient_accumulation_steps
        samples = batches.indices(batches.start, micro_steps)
        log.info(
            "data.params.views is null, windows never repeat: each of the %d samples of a run (ranks: %d) "
            "will be used once; with data.params.views=4, %d samples are encoded and reused",
            *(len(samples), mesh.world_size, 4 * len(train)),
        )
    valid = None
    if config.args.eval_interval is not None:
        valid = build_valid_dataset(config, mesh, headers=cache.file_metadata)
    return [("train", train, samples), *([] if valid is None else [("valid", valid, range(len(valid)))])]


def _find_work(mesh: ProcessMesh, name: str, dataset: EncodedDataset, samples: Sequence[int]) -> _Work:
    """Finds the missing encodings, each rank in its share of the samples.

    Ranks: all.
    """
    share = find_missing(dataset, samples[mesh.rank :: mesh.world_size], retry_failed=True)
    share_files(mesh, dataset.cache.file_metadata)
    missing: list[MissingEncodings] = [
        sample for part in gather_objects(mesh, share) for sample in part if sample.keys
    ]
    work = drop_repeated(sorted(missing, key=lambda sample: sample.index))
    indices = tuple(sample.index for sample in work)
    return _Work(dataset, indices, len(samples), WorkQueue(mesh, f"encode {name}", len(indices)))


def _captions(config: RunConfig, cache: OpenCache, works: Sequence[_Work]) -> list[CacheEntry]:
    """Returns the captions that are not in the cache; each text once, in the same order on all ranks."""
    records = [
        record for work in works for source in work.dataset.videos.sources for record in source.records
    ]
    texts = {caption for record in records for caption in record.captions}
    if config.model.null_condition == "empty_prompt":
        texts.add("")
    entries = sorted((text_entry(text, cache.encoder_digests) for text in texts), key=lambda each: each.key)
    return [entry for entry in entries if entry.key not in cache.index]


class _Encoding:
    """This rank's share: encodes and publishes captions and samples from the queues, and counts them.

    Workers decode the next samples while the encoders are given the present one, whose copy to the device is
    queued before its kernels, and a thread copies back, hashes and writes those before it. The host runs
    ahead of a GPU by the samples that the thread may leave waiting.

    Args:
        config: The configuration.
        mesh: The process mesh.
        stage: The encoding stage, whose encoders are loaded here.
        encode: Encodes samples and keeps new entries.
        works: Samples to encode of each data set.
        captions: Captions, the same on all ranks.
        stop_request: Whether this process was asked to stop; None: it cannot be.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: ProcessMesh,
        stage: EncodingStage,
        encode: EncodeAndKeep,
        works: Sequence[_Work],
        captions: Sequence[CacheEntry],
        stop_request: StopRequest | None,
    ) -> None:
        self._config, self._mesh, self._stage, self._encode = config, mesh, stage, encode
        self._works, self._captions = works, captions
        self._stop_request = stop_request
        self._caption_queue = WorkQueue(mesh, "encode captions", len(captions))
        self._queues = [self._caption_queue, *(work.queue for work in works)]
        self.encoded = 0
        self.failed: set[str] = set()

    def run(self) -> None:
        """Encodes captions, then samples, without T5 where they need none; finished ones are published."""
        has_samples = any(work.indices for work in self._works)
        needs_text = has_samples and others_encode_text(self._stage.conditions)
        encoders = self._stage.encoders
        encoders.load(vae=has_samples, text=bool(self._captions) or needs_text)
        try:
            with self._progress("captions", self._queues[:1]) as progress:
                self._run_captions(progress)
            if not needs_text:
                encoders.free_text_encoder()
            with self._progress("samples", self._queues[1:]) as progress:
                for work in self._works:
                    self._run_samples(work, progress)
        finally:
            self._encode.writer.publish()

    def _progress(self, unit: str, queues: Sequence[WorkQueue]) -> WorkProgress:
        return WorkProgress(unit, queues, is_shown=self._mesh.rank == 0)

    def _run_samples(self, work: _Work, progress: WorkProgress) -> None:
        dataset, batches = work.dataset, QueuedBatches(work.indices, work.queue.take)
        folder = dataset.cache.folder
        loader = build_loader(
            self._config, self._mesh, dataset.videos, batches, folder, lambda videos: dataset
        )
        for batch in progress.awaited(loader):
            assert isinstance(batch, SampleBatch), "`write` reads no encodings"
            self.encoded += self._encode.keep(batch)
            work.queue.finish_one()
            progress.update()
            if self._must_stop():
                loader.close()
                break
        for failure in loader.failures.by_clip.values():
            self.failed.add(failure.clip_id)
            self._keep_failure(dataset, failure)

    def _run_captions(self, progress: WorkProgress) -> None:
        setting = self._config.require_data().captions_at_once
        size = captions_at_once(setting, on_gpu=self._stage.encoders.text_device.type == "cuda")
        numbers = iter(self._caption_queue)
        while batch := [self._captions[number] for number in islice(numbers, size)]:
            self._encode.keep_captions(batch)
            self.encoded += len(batch)
            for _ in batch:
                self._caption_queue.finish_one()
            progress.update()
            if self._must_stop():
                return

    def _must_stop(self) -> bool:
        """Returns whether this rank was asked to stop; the queues are then closed for all ranks."""
        if self._stop_request:
            for queue in self._queues:
                queue.close()
        return bool(self._stop_request)

    def _keep_failure(self, dataset: EncodedDataset, failure: ClipFailure) -> None:
        """Records that a clip cannot be decoded: a run that reads the cache uses the same substitute."""
        if failure.may_pass or failure.ref is None or failure.sample_index is None:
            return
        try:
            clip = dataset.entries(failure.sample_index, failure.ref)[CLIP]
        except BadClip:  # it cannot even be opened, which each run detects again
            return
        detail = (failure.cause, failure.detail)
        info = EntryInfo("failed", failure.clip_id, "", clip.info.origin, detail)
        self._encode.writer.add(clip.key, {}, info)

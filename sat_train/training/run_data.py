"""Config -> what a run trains on: its loaders, and whether the cache spares it the encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sat_train.checkpoint.find import ResumePoint
from sat_train.config import RunConfig
from sat_train.config.summary import ClipCounts, RunFacts
from sat_train.data.batch import VideoBatch
from sat_train.data.batches import DataPosition
from sat_train.data.build import build_train_loader, build_valid_loader, count_steps
from sat_train.data.cache.key import text_key
from sat_train.data.cache.missing import find_missing
from sat_train.data.cache.samples import Condition, OpenCache
from sat_train.data.loader import OrderedLoader
from sat_train.distributed.collectives import check_all_ranks, gather_objects
from sat_train.distributed.processes import ProcessMesh
from sat_train.encoding.build import build_writer
from sat_train.encoding.encode import SampleEncoder
from sat_train.encoding.encoders import Encoders
from sat_train.encoding.shared_cache import open_cache, share_files
from sat_train.errors import DataError
from sat_train.log import get_logger
from sat_train.training.loop.callback import Callback

log = get_logger(__name__)

_SHOWN = 5  # clips in one message


@dataclass(frozen=True)
class RunData:
    """What a run trains on.

    Args:
        train: Endless loader of this rank.
        valid: Loader of the validation batches; None for a run that does not validate.
        train_iters: Steps of the run.
        needs_encoders: T5 and the autoencoder must be loaded.
        cache: Where encoded samples are; None without.
    """

    train: OrderedLoader
    valid: OrderedLoader | None
    train_iters: int
    needs_encoders: bool
    cache: OpenCache | None

    def facts(self, mesh: ProcessMesh) -> RunFacts:
        """Returns what the summary of a run says beyond its configuration."""
        clips = [0 if loader is None else _count_clips(loader) for loader in (self.train, self.valid)]
        return RunFacts(clips=ClipCounts(*clips), data_ranks=mesh.data_size, steps=self.train_iters)

    def null_text(self) -> Tensor | None:
        """Returns the embedding of the empty prompt from the cache, if it is there."""
        if self.cache is None:
            return None
        entry = self.cache.index.read(text_key("", text=self.cache.encoder_digests.text))
        return entry["text"] if entry else None


def open_data(
    config: RunConfig,
    mesh: ProcessMesh,
    *,
    point: ResumePoint | None = None,
    run_directory: Path | None = None,
) -> RunData:
    """Builds the loaders, and looks whether all that the run will read is in the cache.

    Args:
        config: The configuration.
        mesh: Who this rank is.
        point: The checkpoint that the run resumes; None for a new run.
        run_directory: Gets the names of bad clips; None: they are only logged.

    Raises:
        DataError: No usable data, or `data.cache: require` and something is missing.

    Ranks: all.
    """
    mode = config.require_data().cache
    cache = None if mode == "off" else open_cache(config, mesh, "require" if mode == "require" else "read")
    train = build_train_loader(
        config, mesh, start=position_of(point), run_directory=run_directory, cache=cache
    )
    if point is not None and point.manifest.data_fingerprint != train.fingerprint:
        log.warning(
            "the training data are not those of the checkpoint (fingerprint %s, was %s): the run continues "
            "at sample %d of the new order, in which clips may come again or not at all in this epoch",
            *(train.fingerprint, point.manifest.data_fingerprint, train.position.consumed),
        )
    valid = None
    if config.args.eval_interval is not None:
        valid = build_valid_loader(config, mesh, run_directory=run_directory, cache=cache)
    train_iters = count_steps(config, train.batches, 0 if point is None else point.step)
    needs_encoders = True
    if cache is not None:
        steps = train_iters - (point.step if point is not None else 0)
        micro_steps = max(0, steps) * config.args.gradient_accumulation_steps
        samples = train.batches.indices(train.position, micro_steps)
        is_complete = check_complete(config, mesh, cache, train, valid, samples)
        needs_encoders = not is_complete or samples_videos(config)
        log.info("%s", _told(config, is_complete))
    return RunData(train, valid, train_iters, needs_encoders, cache)


def position_of(point: ResumePoint | None) -> DataPosition:
    """Returns where a run stands in the data when it resumes a checkpoint, or begins."""
    if point is None:
        return DataPosition()
    waiting = point.manifest.samples_waiting
    return DataPosition(point.manifest.samples_consumed + len(waiting), waiting)


def samples_videos(config: RunConfig) -> bool:
    """Tells whether validation samples videos, which takes both encoders' models."""
    return config.args.eval_interval is not None and config.args.valid_video_interval is not None


def check_complete(
    config: RunConfig,
    mesh: ProcessMesh,
    cache: OpenCache,
    train: OrderedLoader,
    valid: OrderedLoader | None,
    samples: Sequence[int],
) -> bool:
    """Tells whether the cache has all that a run will read.

    Args:
        samples: Global indices of the samples that are still to be trained on.

    Raises:
        DataError: It has not, and `data.cache` is `require`.

    Ranks: all; each looks for its share, and all know afterwards what each has hashed.
    """
    shown = [] if valid is None else valid.batches.indices(valid.batches.start)
    missing = find_missing(train.dataset, samples[mesh.rank :: mesh.world_size])
    if valid is not None:
        missing += find_missing(valid.dataset, shown[mesh.rank :: mesh.world_size])
    share_files(mesh, cache.file_metadata)
    shares = gather_objects(mesh, [sample.clip_id for sample in missing])
    clips = [clip for share in shares for clip in share]
    has_null = config.model.null_condition == "zero" or _null_key(cache) in cache.index
    error = None
    if config.require_data().cache == "require" and (clips or not has_null):
        error = DataError(
            f"data.cache = require, and {len(clips)} of {len(samples) + len(shown)} samples, validation's "
            f"included, are not in {cache.folder}"
            + "".join(f"\n    {clip}" for clip in sorted(set(clips))[:_SHOWN])
            + ("" if has_null else "\n    the empty prompt"),
            expected="all samples of the run, encoded with these files, settings and encoders",
            remedy="torchrun launch/precompute.py with the same --base and words, or data.cache=fill",
        )
    check_all_ranks(mesh, error)
    return not clips and has_null


class CacheFiller(Callback):
    """Encodes what is missing as training goes, and publishes it, also when the run ends early.

    Args:
        config: The configuration.
        mesh: The process mesh; of ranks that see the same samples only the first one writes.
        encoders: The encoders.
        cache: The open cache.
    """

    optional = True  # what it fails to keep is encoded again

    def __init__(self, config: RunConfig, mesh: ProcessMesh, encoders: Encoders, cache: OpenCache) -> None:
        self._encoders, self._cache = encoders, cache
        self._image_to_video = config.model.noised_image_input
        self._writes = mesh.model_rank == 0
        self._writer = build_writer(config, mesh, cache, waits=True)
        if (
            config.model.null_condition == "empty_prompt"
            and self._writes
            and _null_key(cache) not in cache.index
        ):
            self._encoder("plain").keep_text(_null_key(cache), "")

    def train(self) -> Callable[[VideoBatch], VideoBatch]:
        """Returns what puts encodings in place of the pixels of a training batch."""
        return self._encoder("noised").complete

    def valid(self) -> Callable[[VideoBatch], VideoBatch]:
        """Returns what puts encodings in place of the pixels of a validation batch."""
        return self._encoder("plain").complete

    def closed(self) -> None:
        """Publishes what is left."""
        self._writer.publish_or_warn()

    def _encoder(self, image: Condition) -> SampleEncoder:
        return SampleEncoder(
            self._encoders,
            writer=self._writer,
            encoder_digests=self._cache.encoder_digests,
            is_there=lambda key: not self._writes or self._cache.index.is_whole(key),
            image=image if self._image_to_video else None,
        )


def _count_clips(loader: OrderedLoader) -> int:
    return sum(len(source) for source in loader.dataset.sources)


def _null_key(cache: OpenCache) -> str:
    return text_key("", text=cache.encoder_digests.text)


def _told(config: RunConfig, is_complete: bool) -> str:
    data = config.require_data()
    if not is_complete:
        told = "not all samples are there, the rest is encoded" + " and kept" * (data.cache == "fill")
    elif samples_videos(config):
        told = "all samples are there; T5 and the VAE are loaded because validation samples videos"
    else:
        told = "all samples are there; neither T5 nor the VAE is loaded"
    return f"cache {data.cache_dir}: {told}"

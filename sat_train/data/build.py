"""Builds the loaders of a run from its configuration."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sat_train.config import RunConfig
from sat_train.config.shapes import ClipShape, allowed_shapes
from sat_train.data.batches import Batches, DataPosition, OrderedBatches
from sat_train.data.buckets import SampleSpec
from sat_train.data.clips.remote import file_name
from sat_train.data.dataset import VideoDataset
from sat_train.data.failure_log import ClipFailure, FailureLog, write_failures
from sat_train.data.fields.reader import FieldReader
from sat_train.data.loader import OrderedLoader, SampleReader, VideoLoader
from sat_train.data.prepass import ClipSet, HeaderMemory, assign_clips, describe_clip_set, look_at
from sat_train.data.sampler import GlobalOrder
from sat_train.data.shared_memory import bytes_in_flight, warn_of_little_shared_memory
from sat_train.data.sources.read import build_source_options, read_sources
from sat_train.data.sources.records import ClipSource
from sat_train.distributed.collectives import gather_objects, on_rank_0
from sat_train.distributed.environment import RankEnv
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import DataError
from sat_train.log import get_logger

log = get_logger(__name__)

_TRAIN, _VALID = 0, 1
QUARANTINE = "quarantine.jsonl"

ReaderOf = Callable[[VideoDataset], SampleReader]


def build_train_loader(
    config: RunConfig,
    mesh: ProcessMesh,
    *,
    start: DataPosition | None = None,
    run_directory: Path | None = None,
    headers: HeaderMemory | None = None,
    reader_of: ReaderOf | None = None,
) -> OrderedLoader:
    """Builds the endless loader of this rank.

    Args:
        config: `args` and `data` are read.
        mesh: Who this rank is.
        start: Where the run stands, from the checkpoint; None: at the beginning.
        run_directory: Gets `quarantine.jsonl`; None: bad clips are only logged.
        headers: Those that are known already.
        reader_of: Data set -> what makes samples of its clips; None decodes them.

    Raises:
        DataError: No data, or data that cannot be used.

    Ranks: all.
    """
    dataset = build_train_dataset(config, mesh, run_directory=run_directory, headers=headers)
    batches = build_train_batches(config, mesh, dataset, start=start)
    loader = build_loader(config, mesh, dataset, batches, run_directory, reader_of)
    if mesh.local_rank == 0 and loader.reader.decodes:
        planes = [field.settings for field in config.require_data().fields.values()]
        needed = bytes_in_flight(
            dataset.buckets.shapes,
            batch_sizes(config, config.args.batch_size),
            planes_of=lambda frames: sum(each.planes(frames) for each in planes),
            num_workers=config.args.num_workers,
            prefetch_factor=config.args.prefetch_factor,
        )
        warn_of_little_shared_memory(needed, local_ranks=RankEnv.read().local_world_size)
    return loader


def build_train_batches(
    config: RunConfig, mesh: ProcessMesh, dataset: VideoDataset, *, start: DataPosition | None = None
) -> OrderedBatches:
    """Builds the assignment of samples to this rank."""
    epochs = config.args.epochs if config.args.train_iters is None else None
    return OrderedBatches(
        batch_sizes(config, config.args.batch_size),
        bucket_of=dataset.bucket,
        rank=mesh.data_rank,
        num_ranks=mesh.data_size,
        accumulation=config.args.gradient_accumulation_steps,
        start=start,
        goal=None if epochs is None else epochs * len(dataset),
    )


def count_steps(config: RunConfig, batches: OrderedBatches, steps_done: int = 0) -> int:
    """Returns the steps of a run: `args.train_iters`, or those done plus those that `args.epochs` needs."""
    if config.args.train_iters is not None:
        return config.args.train_iters
    micro_steps = batches.micro_steps_left(batches.start)
    return steps_done + -(-micro_steps // config.args.gradient_accumulation_steps)


def batch_sizes(config: RunConfig, batch_size: int) -> list[int]:
    """Returns the samples per rank in a micro-batch of each shape: as many as fit into the budget."""
    params = config.require_data().params
    budget = None if params.buckets is None else params.buckets.max_tokens
    shapes = allowed_shapes(params, config.spec)
    return [budget // _tokens(config, shape) if budget else batch_size for shape in shapes]


def _tokens(config: RunConfig, shape: ClipShape) -> int:
    return config.spec.tokens(config.spec.latent(*shape))


def build_train_dataset(
    config: RunConfig,
    mesh: ProcessMesh,
    *,
    run_directory: Path | None = None,
    headers: HeaderMemory | None = None,
    each_view_once: bool = False,
) -> VideoDataset:
    """Builds the training set.

    Args:
        config: `args` and `data` are read.
        mesh: Who this rank is.
        run_directory: Its `quarantine.jsonl` names the clips that are left out; None: only the log does.
        headers: Those that are known already.
        each_view_once: Clips come as they are listed, all in their first view, then all in their second, ...

    Raises:
        DataError: No data, or data that cannot be used.

    Ranks: all.
    """
    if not config.args.train_data:
        raise DataError(
            "args.train_data is not set",
            expected="folders or manifests of clips",
            remedy="--base ... args.train_data=[my_clips]",
        )
    sources = _read_sources(config, mesh, config.args.train_data, part=_TRAIN)
    clip_set = _prepass(config, mesh, sources, config.args.batch_size, run_directory, headers)
    if each_view_once:
        order = _listed_order(config, clip_set)
    else:
        order = GlobalOrder(
            seed=config.args.seed,
            clip_weights=[[record.weight for record in source.records] for source in clip_set.sources],
            source_weights=config.args.train_data_weights,
        )
    return _build_dataset(config, clip_set, order, views=config.require_data().params.views, training=True)


def build_valid_loader(
    config: RunConfig,
    mesh: ProcessMesh,
    *,
    run_directory: Path | None = None,
    headers: HeaderMemory | None = None,
    reader_of: ReaderOf | None = None,
) -> OrderedLoader | None:
    """Builds this rank's loader of the validation clips, the same ones each time and at any number of ranks.

    There are `args.eval_iters` times `args.eval_batch_size` of them, which the ranks share. Without
    validation data there is none.

    Raises:
        DataError: As for training.

    Ranks: all.
    """
    dataset = build_valid_dataset(config, mesh, run_directory=run_directory, headers=headers)
    if dataset is None:
        return None
    batch_size = _valid_batch_size(config)
    stop = min(len(dataset), config.args.eval_iters * batch_size)
    batches = OrderedBatches(
        batch_sizes(config, batch_size),
        bucket_of=dataset.bucket,
        rank=mesh.data_rank,
        num_ranks=mesh.data_size,
        stop=stop,
    )
    return build_loader(config, mesh, dataset, batches, run_directory, reader_of)


def build_valid_dataset(
    config: RunConfig,
    mesh: ProcessMesh,
    *,
    run_directory: Path | None = None,
    headers: HeaderMemory | None = None,
) -> VideoDataset | None:
    """Builds the validation set: each clip in one view, the same in every run.

    It is the clips of `args.valid_data` in the order of their names, or the share of `args.train_data` that
    `args.split` keeps for validation. Without either there is none.

    Raises:
        DataError: As for training.

    Ranks: all.
    """
    entries = config.args.valid_data or config.args.train_data
    if not entries or (not config.args.valid_data and not config.data_shares()[_VALID]):
        return None
    sources = _read_sources(config, mesh, entries, part=_VALID)
    clip_set = _prepass(config, mesh, sources, _valid_batch_size(config), run_directory, headers)
    return _build_dataset(config, clip_set, _listed_order(config, clip_set), views=1, training=False)


def _valid_batch_size(config: RunConfig) -> int:
    return config.args.eval_batch_size or config.args.batch_size


def _listed_order(config: RunConfig, clip_set: ClipSet) -> GlobalOrder:
    weights = [[1.0] * len(source) for source in clip_set.sources]
    return GlobalOrder(seed=config.args.seed, clip_weights=weights, shuffle=False)


def _build_dataset(
    config: RunConfig, clip_set: ClipSet, order: GlobalOrder, *, views: int | None, training: bool
) -> VideoDataset:
    return VideoDataset(
        sources=clip_set.sources,
        order=order,
        buckets=clip_set.buckets,
        spec=build_sample_spec(config),
        seed=config.args.seed,
        timeout_s=config.require_data().worker_timeout_s,
        fields=build_field_readers(config),
        views=views,
        training=training,
    )


def build_field_readers(config: RunConfig) -> dict[str, FieldReader]:
    """Builds the readers of `data.fields`, by name."""
    return {name: field.build() for name, field in sorted(config.require_data().fields.items())}


def build_sample_spec(config: RunConfig) -> SampleSpec:
    """Builds the shape and rate of the samples."""
    params = config.require_data().params
    return SampleSpec(
        shapes=allowed_shapes(params, config.spec),
        fps=params.fps,
        skip_frms_num=params.skip_frms_num,
        window=params.window,
        short_clip=params.short_clip,
        max_upscale=params.max_upscale,
        images=config.model.noised_image_input,
    )


def build_loader(
    config: RunConfig,
    mesh: ProcessMesh,
    dataset: VideoDataset,
    batches: Batches,
    run_directory: Path | None,
    reader_of: ReaderOf | None = None,
) -> VideoLoader[Batches]:
    """Builds the loader of a data set from the sections `args` and `data`."""
    data = config.require_data()
    failures = FailureLog(
        num_clips=sum(len(source) for source in dataset.sources),
        max_bad_fraction=data.max_bad_fraction,
        path=run_directory and run_directory / QUARANTINE,
        rank=mesh.rank,
    )
    return VideoLoader(
        dataset=dataset,
        batches=batches,
        failures=failures,
        reader=reader_of and reader_of(dataset),
        num_workers=config.args.num_workers,
        prefetch_factor=config.args.prefetch_factor,
        pin_memory=mesh.device.type == "cuda",
        worker_timeout_s=data.worker_timeout_s,
        replaces_lost=mesh.model_size == 1,
        fingerprint=_fingerprint(dataset.sources),
    )


def _read_sources(
    config: RunConfig, mesh: ProcessMesh, entries: Sequence[str], *, part: int
) -> list[ClipSource]:
    """Reads the sources on rank 0 and sends them to the others, so that all ranks hold the same list.

    Args:
        part: What they are for, and what is kept of them where there is no `args.valid_data`.

    Ranks: all.
    """
    is_divided = not config.args.valid_data

    def read() -> list[ClipSource]:
        shares = config.data_shares() if is_divided else None
        options = build_source_options(config.require_data())
        return _name_apart(read_sources(entries, options, shares=shares, part=part))

    return on_rank_0(mesh, read, may_take_long=True)


def _prepass(
    config: RunConfig,
    mesh: ProcessMesh,
    sources: Sequence[ClipSource],
    batch_size: int,
    run_directory: Path | None,
    headers: HeaderMemory | None,
) -> ClipSet:
    """Finds short clips, splits long ones and assigns shapes; logs the result.

    Ranks: all.
    """
    spec = build_sample_spec(config)
    look = functools.partial(
        look_at,
        headers=headers,
        with_turn=spec.needs_turn,
        timeout_s=config.require_data().worker_timeout_s,
    )
    clip_set = assign_clips(mesh, sources, spec, look)
    for listed, source in zip(sources, clip_set.sources, strict=True):
        _check_not_empty(source, listed, spec)
        part = f" ({source.part})" if source.part else ""
        log.info("%s: %d clips%s, fingerprint %s", source.name, len(source), part, source.fingerprint)
        others = ", ".join(f"{count} {suffix}" for suffix, count in source.ignored)
        for note in (*([f"other files found: {others}"] if others else []), *source.notes):
            log.info("%s: %s", source.name, note)
        if source.faults:
            log.warning("%s: %s", source.name, source.left_out())
    tokens = [_tokens(config, shape) for shape in spec.shapes]
    sizes = [size * mesh.data_size for size in batch_sizes(config, batch_size)]
    log.info("%s", describe_clip_set(clip_set, sizes, tokens))
    left_out = [*_left_out(sources), *clip_set.left_out]
    if left_out and run_directory is not None and mesh.rank == 0:
        write_failures(run_directory / QUARANTINE, left_out, rank=mesh.rank)
    return clip_set


def _left_out(sources: Sequence[ClipSource]) -> list[ClipFailure]:
    """Returns the clips that their sources could not use."""
    return [ClipFailure(None, name, "unusable", why) for source in sources for name, why in source.faults]


def _name_apart(sources: Sequence[ClipSource]) -> list[ClipSource]:
    """Prefixes clip names with their source's last folder, or its whole name if two of these are equal."""
    ends = [file_name(source.name) for source in sources]
    renamed = []
    for source, end in zip(sources, ends, strict=True):
        prefix = end if ends.count(end) == 1 else source.name
        records = [replace(record, clip_id=f"{prefix}/{record.clip_id}") for record in source.records]
        renamed.append(replace(source, records=tuple(records)))
    return renamed


def _check_not_empty(source: ClipSource, listed: ClipSource, spec: SampleSpec) -> None:
    if len(source):
        return
    of = f" of {listed.part}" if listed.part else ""
    raise DataError(
        f"{source.name}: no clip is left{of}: none of {len(listed)} gives a sample",
        expected=f"clips of {spec.least_frames} frames at {spec.fps:g} a second",
        remedy="lower data.params.max_num_frames, or set data.params.short_clip: pad",
    )


def _fingerprint(sources: Sequence[ClipSource]) -> str:
    text = "".join(source.fingerprint for source in sources)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sum_bad_clips(mesh: ProcessMesh, loader: OrderedLoader) -> int:
    """Counts the bad clips of all ranks, and ends the run on all ranks if there are too many.

    Returns:
        Clips that are bad, on any rank.

    Raises:
        DataError: More than `data.max_bad_fraction` of the set.

    Ranks: all.
    """
    ours = loader.failures.by_clip
    bad_clips: dict[str, ClipFailure] = {}
    for theirs in gather_objects(mesh, ours):
        bad_clips.update(theirs)
    try:
        loader.failures.check(bad_clips)
    except DataError as error:
        error.ranks_agree = True
        raise
    return len(bad_clips)

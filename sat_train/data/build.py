"""From the run's configuration to its loaders."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sat_train.config import RunConfig
from sat_train.data.batches import DataPosition, ListedBatches, OrderedBatches
from sat_train.data.cache.samples import Condition, OpenCache, SampleCache
from sat_train.data.dataset import VideoDataset
from sat_train.data.failures import FailureLog
from sat_train.data.loader import VideoLoader
from sat_train.data.plan import Probed, cut_chunks, keep_long, probe_clips
from sat_train.data.sampler import GlobalOrder
from sat_train.data.sources import ClipSource, read_source, split_source
from sat_train.distributed.collectives import broadcast_object, check_all_ranks, gather_objects
from sat_train.distributed.processes import ProcessGrid
from sat_train.errors import DataError
from sat_train.log import get_logger

log = get_logger(__name__)

_TRAIN, _VALID = 0, 1
QUARANTINE = "quarantine.jsonl"


def build_train_loader(
    run: RunConfig,
    grid: ProcessGrid,
    *,
    start: DataPosition | None = None,
    run_folder: Path | None = None,
    cache: OpenCache | None = None,
) -> VideoLoader:
    """Builds the endless loader of this rank.

    Args:
        run: `args` and `data` are read.
        grid: Who this rank is.
        start: Where the run stands, from the checkpoint; None: at the beginning.
        run_folder: Gets `quarantine.jsonl`; None: bad clips are only logged.
        cache: Where encoded samples may be.

    Raises:
        DataError: No data, or data that cannot be used.

    Ranks: all.
    """
    dataset = build_train_dataset(run, grid, cache=cache)
    return build_loader(run, grid, dataset, plan_train_batches(run, grid, start=start), run_folder)


def plan_train_batches(
    run: RunConfig, grid: ProcessGrid, *, start: DataPosition | None = None
) -> OrderedBatches:
    """Returns which samples a rank trains on."""
    return OrderedBatches([run.args.batch_size], rank=grid.data_rank, num_ranks=grid.data_size, start=start)


def build_train_dataset(
    run: RunConfig, grid: ProcessGrid, *, cache: OpenCache | None = None, each_view_once: bool = False
) -> VideoDataset:
    """Builds the training set.

    Args:
        run: `args` and `data` are read.
        grid: Who this rank is.
        cache: Where encoded samples may be.
        each_view_once: Clips come as they are listed, all in their first view, then all in their second, ...

    Raises:
        DataError: No data, or data that cannot be used.

    Ranks: all.
    """
    if not run.args.train_data:
        raise DataError(
            "args.train_data is not set",
            expected="folders or manifests of clips",
            remedy="--base ... args.train_data=[my_clips]",
        )
    sources = _read_sources(run, grid, run.args.train_data, part=None if run.args.valid_data else _TRAIN)
    if each_view_once:
        order = _listed_order(run, sources)
    else:
        order = GlobalOrder(
            seed=run.args.seed,
            clip_weights=[[record.weight for record in source.records] for source in sources],
            source_weights=run.args.train_data_weights,
        )
    return _build_dataset(run, sources, order, run.data.params.views, "noised", cache)


def build_valid_loader(
    run: RunConfig, grid: ProcessGrid, *, run_folder: Path | None = None, cache: OpenCache | None = None
) -> VideoLoader | None:
    """Builds the loader of `args.eval_iters` validation batches of this rank, the same ones each time.

    Without validation data there is none.

    Raises:
        DataError: As for training.

    Ranks: all.
    """
    dataset = build_valid_dataset(run, grid, cache=cache)
    if dataset is None:
        return None
    batch_size = run.args.eval_batch_size or run.args.batch_size
    stop = min(len(dataset), run.args.eval_iters * batch_size * grid.data_size)
    batches = OrderedBatches([batch_size], rank=grid.data_rank, num_ranks=grid.data_size, stop=stop)
    return build_loader(run, grid, dataset, batches, run_folder)


def build_valid_dataset(
    run: RunConfig, grid: ProcessGrid, *, cache: OpenCache | None = None
) -> VideoDataset | None:
    """Builds the validation set: each clip in one view, the same in every run.

    It is the clips of `args.valid_data` in the order of their names, or the share of `args.train_data` that
    `args.split` keeps for validation. Without either there is none.

    Raises:
        DataError: As for training.

    Ranks: all.
    """
    entries = run.args.valid_data or run.args.train_data
    if not entries or (not run.args.valid_data and not _shares(run)[_VALID]):
        return None
    sources = _read_sources(run, grid, entries, part=None if run.args.valid_data else _VALID)
    return _build_dataset(run, sources, _listed_order(run, sources), 1, "plain", cache)


def _listed_order(run: RunConfig, sources: Sequence[ClipSource]) -> GlobalOrder:
    weights = [[1.0] * len(source) for source in sources]
    return GlobalOrder(seed=run.args.seed, clip_weights=weights, shuffle=False)


def _build_dataset(
    run: RunConfig,
    sources: Sequence[ClipSource],
    order: GlobalOrder,
    views: int | None,
    condition: Condition,
    cache: OpenCache | None,
) -> VideoDataset:
    params = run.data.params
    shape = {"fps": params.fps, "max_upscale": params.max_upscale}
    samples = None
    if cache is not None:
        image = condition if run.model.noised_image_input else None
        samples = SampleCache(cache, size=tuple(params.video_size), image=image, **shape)
    return VideoDataset(
        sources=sources,
        order=order,
        video_size=tuple(params.video_size),
        max_num_frames=params.max_num_frames,
        seed=run.args.seed,
        skip_frms_num=params.skip_frms_num,
        window=params.window,
        short_clip=params.short_clip,
        timeout_s=run.data.worker_timeout_s,
        views=views,
        cache=samples,
        **shape,
    )


def build_loader(
    run: RunConfig,
    grid: ProcessGrid,
    dataset: VideoDataset,
    batches: OrderedBatches | ListedBatches,
    run_folder: Path | None,
) -> VideoLoader:
    """Builds the loader of a data set, as `args` and `data` want it.

    Raises:
        DataError: Clips of several lengths in one batch.
    """
    _check_shapes(run, run.args.batch_size)
    failures = FailureLog(
        num_clips=sum(len(source) for source in dataset.sources),
        max_bad_fraction=run.data.max_bad_fraction,
        path=run_folder and run_folder / QUARANTINE,
        rank=grid.rank,
    )
    return VideoLoader(
        dataset=dataset,
        batches=batches,
        failures=failures,
        num_workers=run.args.num_workers,
        prefetch_factor=run.args.prefetch_factor,
        pin_memory=grid.device.type == "cuda",
        worker_timeout_s=run.data.worker_timeout_s,
        replaces_lost=grid.model_size == 1,
        fingerprint=_fingerprint(dataset.sources),
    )


def _check_shapes(run: RunConfig, batch_size: int) -> None:
    if run.data.params.short_clip == "shrink" and batch_size > 1:
        raise DataError(
            f"data.params.short_clip = shrink: batches of {batch_size} cannot hold clips of several lengths",
            expected="batch_size 1 (use gradient_accumulation_steps), or short_clip error, skip or pad",
        )


def _read_sources(
    run: RunConfig, grid: ProcessGrid, entries: Sequence[str], *, part: int | None
) -> list[ClipSource]:
    """Reads the sets on rank 0 and tells the others, so that all ranks hold the same list.

    Args:
        part: Share of `args.split` to keep; None keeps all.

    Ranks: all.
    """
    sources, error = None, None
    if grid.rank == 0:
        try:
            sources = [read_source(entry) for entry in entries]
            if part is not None:
                sources = [split_source(source, _shares(run), part) for source in sources]
            sources = _name_apart(sources)
        except DataError as caught:
            error = caught
    check_all_ranks(grid, error)
    sources = broadcast_object(grid, sources)
    sources = [_plan(run, grid, source) for source in sources]
    for source in sources:
        _check_not_empty(source, run)
        others = ", ".join(f"{count} {suffix}" for suffix, count in source.ignored)
        also = f"; not clips: {others}" if others else ""
        log.info("%s: %d clips, fingerprint %s%s", source.name, len(source), source.fingerprint, also)
    return sources


def _name_apart(sources: Sequence[ClipSource]) -> list[ClipSource]:
    """Puts a set's name before its clips' names: its last folder, or all of it where two end alike."""
    ends = [Path(source.name).name for source in sources]
    named = []
    for source, end in zip(sources, ends, strict=True):
        prefix = end if ends.count(end) == 1 else source.name
        records = [replace(record, clip_id=f"{prefix}/{record.clip_id}") for record in source.records]
        named.append(replace(source, records=tuple(records)))
    return named


def _plan(run: RunConfig, grid: ProcessGrid, source: ClipSource) -> ClipSource:
    """Looks into all clips where the configuration needs that: to skip short ones or to cut long ones.

    Ranks: all.
    """
    params = run.data.params
    if params.short_clip != "skip" and params.window != "chunks":
        return source
    clips = _probe(run, grid, source)
    numbers = {"fps": params.fps, "num_frames": params.max_num_frames, "skip_frms_num": params.skip_frms_num}
    if params.short_clip == "skip":
        long = keep_long(clips, **numbers)
        log.info("%s: %d of %d clips are too short", source.name, len(clips) - len(long), len(clips))
        clips = long
    records = [record for record, _ in clips]
    if params.window == "chunks":
        records = cut_chunks(clips, **numbers)
        log.info("%s: %d clips give %d chunks", source.name, len(clips), len(records))
    return source.with_records(records)


def _probe(run: RunConfig, grid: ProcessGrid, source: ClipSource) -> list[Probed]:
    """Ranks: all; each looks into its share."""
    shares = gather_objects(
        grid, probe_clips(source.records[grid.rank :: grid.world_size], timeout_s=run.data.worker_timeout_s)
    )
    return [shares[i % grid.world_size][i // grid.world_size] for i in range(len(source))]


def _check_not_empty(source: ClipSource, run: RunConfig) -> None:
    if len(source):
        return
    raise DataError(
        f"{source.name}: no clip is left",
        expected=f"clips of {run.data.params.max_num_frames} frames at {run.data.params.fps:g} a second",
        remedy="lower data.params.max_num_frames, set data.params.short_clip: pad, or change args.split",
    )


def _shares(run: RunConfig) -> list[float]:
    return [float(share) for share in run.args.split.split(",")]


def _fingerprint(sources: Sequence[ClipSource]) -> str:
    text = "".join(source.fingerprint for source in sources)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sum_bad_clips(grid: ProcessGrid, loader: VideoLoader) -> int:
    """Adds up the bad clips of all ranks and ends the run on all of them when there are too many.

    Returns:
        Clips that are bad, on any rank.

    Raises:
        DataError: More than `data.max_bad_fraction` of the set.

    Ranks: all.
    """
    found: set[str] = set().union(*gather_objects(grid, set(loader.failures.by_clip)))
    loader.failures.check(len(found))
    return len(found)

"""Config -> the callbacks of a run, in the order of their calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sat_train.config import RunConfig
from sat_train.config.run_warnings import RunWarnings
from sat_train.data.loader import OrderedLoader
from sat_train.distributed.collectives import broadcast_object
from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.seeds import derive_seed
from sat_train.encoding.encode import Encode, EncodeAndKeep
from sat_train.engine.engine import TrainEngine
from sat_train.log import get_logger
from sat_train.objective.video_diffusion import VideoDiffusion
from sat_train.sampling.build import build_sampling
from sat_train.sampling.generate import generate_video, keep_captions
from sat_train.training.callbacks.bad_clip_count import BadClipCount
from sat_train.training.callbacks.best_checkpoint import BestCheckpoint
from sat_train.training.callbacks.cache_publisher import CachePublisher
from sat_train.training.callbacks.checkpoint import BeginSave, Checkpointer, PreemptedMarker
from sat_train.training.callbacks.condition_check import ConditionCheck
from sat_train.training.callbacks.early_stop import EarlyStop, exhausted_patience
from sat_train.training.callbacks.ema import ExponentialMovingAverage
from sat_train.training.callbacks.gradient_check import GradientCheck
from sat_train.training.callbacks.held_out import HeldOutClips
from sat_train.training.callbacks.loss_terms import LossTerms
from sat_train.training.callbacks.metrics_file import read_validation_losses
from sat_train.training.callbacks.progress import build_progress
from sat_train.training.callbacks.validation import Validation
from sat_train.training.callbacks.validation_file import ValidationFile
from sat_train.training.callbacks.validation_loss import validation_timesteps
from sat_train.training.callbacks.validation_videos import SampleVideos, contact_sheet
from sat_train.training.callbacks.videos_to_sample import VideoToSample, choose_videos
from sat_train.training.callbacks.view_pictures import ViewPictures
from sat_train.training.loop.callback import Callback, CallbackContext

log = get_logger(__name__)


def build_callbacks(
    config: RunConfig,
    mesh: ProcessMesh,
    run_directory: Path | None,
    *,
    train: OrderedLoader,
    valid: OrderedLoader | None,
    encode: Encode,
    pipeline: VideoDiffusion,
    engine: TrainEngine,
    save: BeginSave,
    finish_alone: Callable[[], None],
    is_cached: bool,
) -> list[Callback]:
    """Returns the callbacks: counts and averages, reports, then checkpoints, so that a failure of a later
    callback cannot lose one.

    Ranks: all.
    """
    new, warnings = tuple(pipeline.dit.modules_of_its_own()), RunWarnings(config.args.silence)
    callbacks: list[Callback] = [BadClipCount(mesh, train), GradientCheck(mesh, new, warnings)]
    if len(pipeline.terms) > 1:
        callbacks.append(LossTerms(mesh, names=tuple(pipeline.terms), micro_steps=engine.micro_steps))
    if config.args.ema_decay:
        callbacks.append(ExponentialMovingAverage(engine, config.args.ema_decay))
    callbacks += _registered(config, mesh, run_directory)
    best: BestCheckpoint | None = None
    if run_directory is not None:
        if mesh.rank == 0 and valid is not None and config.args.keep_best:
            best = BestCheckpoint(run_directory)
        checkpointer = Checkpointer(
            mesh,
            run_directory,
            save,
            interval=config.args.save_interval,
            keep_last=config.args.keep_last or 0,
            keep_every=config.args.keep_every or 0,
            in_background=config.args.async_save != "off",
            finish_alone=finish_alone,
            best_step=lambda: None if best is None else best.step,
        )
        callbacks.append(checkpointer)
        if mesh.rank == 0:
            callbacks.append(PreemptedMarker(run_directory))
    if isinstance(encode, EncodeAndKeep):
        callbacks.append(CachePublisher(encode.writer))
    if best is not None:
        callbacks.append(best)
    return callbacks + _validation(
        config, mesh, run_directory, valid, encode, pipeline, engine, is_cached=is_cached
    )


def _registered(config: RunConfig, mesh: ProcessMesh, run_directory: Path | None) -> list[Callback]:
    """Returns the callbacks that YAML names, and the progress display."""
    context = CallbackContext(config, mesh, run_directory)
    parts: list[Callback] = [
        choice.build(context)
        for choice in config.args.all_callbacks()
        if (mesh.rank == 0 or choice.params.every_rank)
        and (run_directory is not None or not choice.params.writes_files)
    ]
    return [build_progress(), *parts] if mesh.rank == 0 else parts


def _validation(
    config: RunConfig,
    mesh: ProcessMesh,
    run_directory: Path | None,
    loader: OrderedLoader | None,
    encode: Encode,
    pipeline: VideoDiffusion,
    engine: TrainEngine,
    *,
    is_cached: bool,
) -> list[Callback]:
    callbacks: list[Callback] = []
    interval = config.args.eval_interval
    if interval is None:
        return callbacks
    if loader is not None:
        if run_directory is not None and mesh.rank == 0:
            callbacks += [ValidationFile(run_directory), ViewPictures(run_directory)]
        if mesh.rank == 0:
            warnings = RunWarnings(config.args.silence)
            callbacks.append(ConditionCheck(config.args.condition_report.warn_after, warnings))
        callbacks.append(
            Validation(
                engine,
                _held_out_clips(config, loader, mesh, pipeline, engine, encode).measure,
                interval=interval,
                report_every=config.args.condition_report.every,
                is_measured=lambda step: broadcast_object(
                    mesh, _is_measured(run_directory if mesh.rank == 0 else None, step)
                ),
            )
        )
        if config.args.early_stop_patience is not None:
            patience, min_delta = config.args.early_stop_patience, config.args.early_stop_min_delta
            callbacks.append(EarlyStop(mesh, run_directory, patience=patience, min_delta=min_delta))
    if config.args.valid_video_interval is not None and run_directory is not None:
        videos = choose_videos(config, pipeline, loader)
        if videos and is_cached:
            keep_captions(pipeline.encoders, pipeline.conditions, [video.caption for video in videos])
        if videos:
            callbacks.append(
                SampleVideos(
                    mesh,
                    engine,
                    run_directory,
                    videos=videos,
                    generate=_generator(config, pipeline, engine, videos),
                    fps=config.sampling_fps,
                    interval=config.args.valid_video_interval,
                    lockstep=mesh.model_size > 1 or engine.zero_stage == 3,
                )
            )
    return callbacks


def _held_out_clips(
    config: RunConfig,
    loader: OrderedLoader,
    mesh: ProcessMesh,
    pipeline: VideoDiffusion,
    engine: TrainEngine,
    encode: Encode,
) -> HeldOutClips:
    report = config.args.condition_report
    names = config.model.conditions if report.conditions is None else report.conditions
    return HeldOutClips(
        loader,
        encode,
        pipeline,
        engine,
        timesteps=validation_timesteps(len(pipeline.alpha_bar), config.args.eval_timesteps),
        mesh=mesh,
        views={
            name: (choice.build(config.spec), choice.clips)
            for name, choice in config.args.validation_views.items()
        },
        conditions=[each for each in pipeline.conditions if each.name in names and each.tensors],
        moves=report.moves,
    )


def early_stop_reason(config: RunConfig, run_directory: Path, step: int) -> str:
    """Returns why a run that has validated up to a step ends there; nothing while it may train.

    Ranks: rank 0 only.
    """
    if config.args.early_stop_patience is None or config.args.eval_interval is None:
        return ""
    return exhausted_patience(
        {at: loss for at, loss in read_validation_losses(run_directory).items() if at <= step},
        patience=config.args.early_stop_patience,
        min_delta=config.args.early_stop_min_delta,
    )


def owes_validation(config: RunConfig, run_directory: Path, step: int, *, measures_loss: bool) -> bool:
    """Returns whether a run ended before it had validated its last step.

    Args:
        config: The configuration.
        run_directory: The run directory.
        step: Its last step.
        measures_loss: The run has validation data.

    Ranks: rank 0 only.
    """
    if config.args.eval_interval is None:
        return False
    if measures_loss and not _is_measured(run_directory, step):
        return True
    return config.args.valid_video_interval is not None and not contact_sheet(run_directory, step).exists()


def _is_measured(run_directory: Path | None, step: int) -> bool:
    """Returns whether `metrics.jsonl` has the validation loss of a step."""
    return run_directory is not None and step in read_validation_losses(run_directory)


def _generator(
    config: RunConfig, pipeline: VideoDiffusion, engine: TrainEngine, videos: Sequence[VideoToSample]
) -> Callable[[int], torch.Tensor]:
    """Returns a generator of video number `n`."""
    settings = build_sampling(config)
    return lambda number: generate_video(
        pipeline,
        settings,
        prompt=videos[number].prompt,
        image_chw=videos[number].image_chw,
        seed=derive_seed(config.args.seed, "validation_video", number),
        network=engine,
    )

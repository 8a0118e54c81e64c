"""Config -> a run, and the run itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sat_train.checkpoint.find import ResumePoint
from sat_train.checkpoint.history import rewind
from sat_train.checkpoint.layout import CLIENT_STATE, PREEMPTED, committed_steps, step_folder
from sat_train.checkpoint.load import open_trained_state, read_client_state
from sat_train.checkpoint.manifest import BaseWeights
from sat_train.checkpoint.retention import remove_leftovers
from sat_train.config import RunConfig
from sat_train.config.learning_rate import build_learning_rate
from sat_train.config.reading import RESOLVED
from sat_train.config.resolved import write_resolved
from sat_train.config.rules import warnings_of_run
from sat_train.config.sat_args import write_model_config
from sat_train.config.summary import summarize
from sat_train.config.values import show_rate
from sat_train.data.batches import LoadedBatch
from sat_train.distributed.collectives import broadcast_object, on_rank_0
from sat_train.distributed.lack_of_memory import TRAINING_REMEDY, explaining_lack_of_memory
from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.seeds import derive_seed
from sat_train.distributed.signals import StopRequest
from sat_train.engine.build import build_engine
from sat_train.engine.engine import TrainEngine
from sat_train.errors import CheckpointError, LaunchError, Stopped
from sat_train.files import reading
from sat_train.log import get_logger
from sat_train.models.kernels import chosen_kernels
from sat_train.objective.video_diffusion import VideoDiffusion
from sat_train.training.callbacks.build import build_callbacks, early_stop_reason, owes_validation
from sat_train.training.loop.meter import Meter
from sat_train.training.loop.model_flops import flops_counter, peak_of
from sat_train.training.loop.state import TrainState
from sat_train.training.loop.step import TrainStep
from sat_train.training.loop.trainer import Trainer
from sat_train.training.models import StartWeights, build_models, find_start_weights
from sat_train.training.resume import (
    CALLBACKS_KEY,
    COUNTERS_KEY,
    RATE_KEY,
    changes_since,
    find_resumed,
)
from sat_train.training.run_data import RunData, open_data
from sat_train.training.run_directory import RunDirectory, claim_run_directory, set_samples_aside
from sat_train.training.saving import build_background_writer, build_save

log = get_logger(__name__)


@explaining_lack_of_memory(TRAINING_REMEDY)
def train(
    config: RunConfig,
    mesh: ProcessMesh,
    *,
    settle: Callable[[RunConfig, ProcessMesh], RunConfig] = lambda config, mesh: config,
) -> None:
    """Builds a run, trains it and leaves its folder in order.

    Args:
        config: The configuration, which the run records.
        mesh: The process mesh.
        settle: Settles what depends on the GPUs, for the models. Called by all ranks.

    Raises:
        SatTrainError: Any fault that a user can cause.

    Ranks: all.
    """
    stop_request = StopRequest().listen()
    set_determinism(config.args.deterministic)
    kernels = chosen_kernels(config.args, mesh.device)
    run_directory = open_run_directory(config, mesh)
    try:
        data = open_data(config, mesh, point=run_directory.point, run_directory=run_directory.folder)
        ending = on_rank_0(mesh, lambda: find_ending(config, run_directory, data))
        if ending and not on_rank_0(mesh, lambda: say_finished(config, run_directory, data, ending)):
            return
        facts = data.facts(mesh)
        log.info("this run:\n%s", summarize(config, facts))
        for warning in warnings_of_run(config, facts):
            log.warning("%s", warning)
        start = find_start_weights(config, mesh, run_directory.point)
        encoders, needed = data.encoding.encoders, data.needs_encoders
        settled = settle(config, mesh)
        pipeline = build_models(
            settled, mesh, start, encoders, with_encoders=needed, sample=data.first_sample
        )
        engine = build_engine(settled, pipeline.dit, mesh)
        trainer = build_trainer(config, mesh, run_directory, data, pipeline, start, engine, stop_request)
        if run_directory.point is not None:
            restore(mesh, run_directory.point, trainer, start.base)
        if not ending:
            on_rank_0(mesh, lambda: describe_run(config, run_directory, data.part_files))
        stop_request.defer()
        with kernels:
            trainer.run()
        engine.close()
        say_where_stopped(config, trainer)
    finally:
        if run_directory.lock is not None:
            run_directory.lock.release()


def say_where_stopped(config: RunConfig, trainer: Trainer) -> None:
    """Logs how to resume a stopped run, and why one has ended early.

    Raises:
        Stopped: A user interrupted it; the exit code is then that of an interrupted command.
    """
    if trainer.finish_reason:
        step, steps = trainer.state.step, trainer.train_iters
        log.info("stopped early at step %d of %d: %s", step, steps, trainer.finish_reason)
    if not trainer.stopping:
        return
    message = f"saved step {trainer.state.step}; resume with args.resume=auto"
    if not trainer.state.step:
        message = "stopped before the first step; there is nothing to save"
    elif config.args.save is None:
        message = f"stopped at step {trainer.state.step}; nothing is saved (args.save = null)"
    if trainer.interrupted:
        raise Stopped(signal.SIGINT, message, ranks_agree=True)
    log.info("%s", message)


def open_run_directory(config: RunConfig, mesh: ProcessMesh) -> RunDirectory:
    """Opens the run's folder and finds the checkpoint to resume; leaves the files of earlier runs unchanged.

    Ranks: all.
    """
    for note in config.notes:
        log.info("%s", note)
    if config.args.save is None:
        return RunDirectory(None, None, None)
    resume_points: list[ResumePoint | None] = [None]

    def resumed() -> Path | None:
        point = resume_points[0] = find_resumed(config)
        return None if point is None else point.run_directory

    folder, lock = claim_run_directory(
        mesh, save_root=Path(config.args.save), experiment_name=config.args.experiment_name, resumed=resumed
    )
    point = broadcast_object(mesh, resume_points[0])
    on_rank_0(mesh, lambda: prepare_folder(folder, point))
    log.info("run directory %s%s", folder, f", resuming from step {point.step}" if point else "")
    return RunDirectory(folder, lock, point)


def prepare_folder(folder: Path, point: ResumePoint | None) -> None:
    """Removes leftovers of a killed run from a folder that this run owns by now.

    Raises:
        LaunchError: Another run has written to it since the checkpoint was found.

    Ranks: rank 0 only.
    """
    if point is not None and committed_steps(folder) != list(point.steps):
        raise LaunchError(
            f"{folder}: another run has written to it while this one started",
            expected="one run at a time in a run directory",
            remedy="start again to resume the run at its newest step",
        )
    remove_leftovers(folder)


def describe_run(config: RunConfig, run_directory: RunDirectory, part_files: Mapping[str, str]) -> None:
    """Makes the resumed step the newest of the folder, and writes the configuration, for users and for SAT.

    Call it once everything has loaded: a resume that fails leaves the folder as it was.

    Raises:
        CheckpointError: Later steps cannot be set aside.
        OSError: The folder cannot be written.

    Ranks: rank 0 only.
    """
    if run_directory.folder is None:
        return
    notes = [f"{path} has the content {content}" for path, content in part_files.items()]
    if run_directory.point is not None:
        notes += [f"resumed at step {run_directory.point.step}", *changes_since(run_directory.point, config)]
        if rewind(run_directory.folder, run_directory.point.step):
            set_samples_aside(run_directory.folder, run_directory.point.step)
    write_resolved(config, run_directory.folder / RESOLVED, notes=notes)
    write_model_config(config, run_directory.folder / "model_config.json")


def find_ending(config: RunConfig, run_directory: RunDirectory, data: RunData) -> str:
    """Returns what ends a run at the step that it resumes, with the way to continue; nothing if it trains.

    Ranks: rank 0 only.
    """
    folder, point = run_directory.folder, run_directory.point
    if folder is None or point is None:
        return ""
    if point.step >= data.train_iters:
        length = "args.train_iters" if config.args.train_iters is not None else "args.epochs"
        return f"(raise {length} to continue)"
    if reason := early_stop_reason(config, folder, point.step):
        return f"by early stop: {reason} (raise args.early_stop_patience to continue, or set it to null)"
    return ""


def say_finished(config: RunConfig, run_directory: RunDirectory, data: RunData, ending: str) -> bool:
    """Logs that the run is complete. The folder stays unchanged, except for the marker of a stopped run.

    Args:
        config: The configuration.
        run_directory: The run directory.
        data: The data.
        ending: From `find_ending`.

    Returns:
        Whether the last step has still to be validated.

    Ranks: rank 0 only.
    """
    folder, point = run_directory.folder, run_directory.point
    assert folder is not None, "only a saved run can be complete"
    assert point is not None, "only a saved run can be complete"
    log.info("finished already: step %d of %d %s", point.step, data.train_iters, ending)
    if changes := changes_since(point, config):
        log.warning("the changed settings have no effect: %s", "; ".join(changes))
    (folder / PREEMPTED).unlink(missing_ok=True)
    is_newest = committed_steps(folder)[0] == point.step
    return is_newest and owes_validation(config, folder, point.step, measures_loss=data.valid is not None)


def build_trainer(
    config: RunConfig,
    mesh: ProcessMesh,
    run_directory: RunDirectory,
    data: RunData,
    pipeline: VideoDiffusion,
    start: StartWeights,
    engine: TrainEngine,
    stop_request: StopRequest,
) -> Trainer:
    """Builds the trainer: step and callbacks around the engine.

    Ranks: all.
    """
    encode = data.encoding.build_encode(mesh)
    writer = build_background_writer(config)
    engine.before_update = writer.wait_until_copied

    def compute_loss(batch: LoadedBatch) -> torch.Tensor:
        # dropout draws from torch's global generator
        torch.manual_seed(derive_seed(config.args.seed, "dropout", batch.sample_indices[0]))
        output = pipeline.training_loss(encode(batch), network=engine)
        trainer.callbacks.loss_computed(output, batch)
        return output.loss

    trainer = Trainer(
        train_step=TrainStep(
            engine=engine,
            compute_loss=compute_loss,
            batches=iter(data.train),
            mesh=mesh,
            stop_request=stop_request,
            count_flops=flops_counter(pipeline.dit, data.train.dataset),
            is_saving=lambda: writer.is_writing,
            prepare_next=lambda: pipeline.draws.draw(data.train.upcoming()),
        ),
        meter=Meter(mesh, peak_tflops=peak_of(mesh.device)),
        learning_rate=build_learning_rate(config.args, data.train_iters),
        train_iters=data.train_iters,
        log_interval=config.args.log_interval,
        state=TrainState(),
        callbacks=build_callbacks(
            config,
            mesh,
            run_directory.folder,
            train=data.train,
            valid=data.valid,
            encode=encode,
            pipeline=pipeline,
            engine=engine,
            is_cached=data.is_cached,
            save=build_save(config, mesh, run_directory, data, start, pipeline.dit, writer),
            finish_alone=writer.finish_alone,
        ),
    )
    return trainer


def restore(
    mesh: ProcessMesh, point: ResumePoint, trainer: Trainer, base_weights: BaseWeights | None
) -> None:
    """Restores engine, callbacks and the trainer's state from the checkpoint that the run resumes.

    Settings of the optimizer come from the configuration, not from the checkpoint.

    Ranks: all.
    """
    engine = trainer.engine
    saved = open_trained_state(mesh, point=point, trained=engine.trained_shapes(), base_weights=base_weights)
    client_state = read_client_state(point)
    path = step_folder(point.run_directory, point.step) / CLIENT_STATE
    expected = "the position of a run, as sat_train writes it"
    with reading(path, error=CheckpointError, expected=expected, remedy="use another step"):
        counters = {str(name): float(value) for name, value in client_state[COUNTERS_KEY].items()}
        trainer.state.restore(
            step=point.step, samples_consumed=point.manifest.samples_consumed, client_state=client_state
        )
        trainer.callbacks.load_state_dict(client_state[CALLBACKS_KEY])
        expected_rate = float(client_state[RATE_KEY])
    engine.load(saved, step=point.step, counters=counters)
    trainer.callbacks.load_tensors(saved)
    say_rate_jump(trainer, expected_rate)


def say_rate_jump(trainer: Trainer, expected: float) -> None:
    """Logs a warning where the curve of the learning rate is not the one that the checkpoint was on.

    Args:
        trainer: The trainer, at the step that it resumes.
        expected: Rate of its next step as the checkpoint's settings had it.
    """
    step = trainer.state.step
    rate = trainer.learning_rate.at(step)
    if step < trainer.train_iters and rate != expected:
        log.warning(
            "the learning rate jumps: step %d has %s; with the settings of the checkpoint it would have %s",
            *(step + 1, show_rate(rate), show_rate(expected)),
        )


def set_determinism(deterministic: bool) -> None:
    """Applies `args.deterministic`: operations without a deterministic kernel then raise."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

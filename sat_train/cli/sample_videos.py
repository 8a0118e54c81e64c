"""Samples videos from prompts into mp4 files and a contact sheet."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sat_train.config import RunConfig
from sat_train.distributed.collectives import (
    check_all_ranks,
    gather_pixels,
    on_rank_0,
    wait_for_ranks,
)
from sat_train.distributed.lack_of_memory import SAMPLING_REMEDY, explaining_lack_of_memory
from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.signals import StopRequest
from sat_train.distributed.work_queue import WorkQueue
from sat_train.encoding.build import build_conditions, build_encoders, turns_for_text
from sat_train.errors import SatTrainError, Stopped
from sat_train.interchange.locate import locate_weights
from sat_train.interchange.module_files import check_module_files
from sat_train.interchange.shared_loading import load_weights_once
from sat_train.log import console, get_logger
from sat_train.models.build import build_dit, compute_dtype
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.kernels import chosen_kernels
from sat_train.models.loaded_adapters import add_adapters_for
from sat_train.models.low_rank import scales_of
from sat_train.objective.build import build_pipeline
from sat_train.objective.video_diffusion import VideoDiffusion
from sat_train.sampling.build import SamplingSettings, build_sampling
from sat_train.sampling.first_frames import request_sample
from sat_train.sampling.generate import generate_video, keep_captions
from sat_train.sampling.prompts import (
    SampleRequest,
    build_requests,
    read_prompt_file,
    read_request_rows,
)
from sat_train.sampling.request_fields import (
    RequestReader,
    build_request_reader,
    read_fields_of_conditions,
)
from sat_train.sampling.video_file import spread_frames, write_contact_sheet, write_mp4
from sat_train.training.models import StartWeights, read_weights_and_updates
from sat_train.weights.tensor_parallel import slice_weights

log = get_logger(__name__)

OnStep = Callable[[int, int], None]


def sample(config: RunConfig, mesh: ProcessMesh) -> None:
    """Generates a video for every prompt of a run; the ranks share the prompts.

    Raises:
        SatTrainError: Prompts, images, weights or the output folder are faulty.

    Ranks: all.
    """
    for note in config.notes:
        log.info("%s", note)
    stop_request = StopRequest("stopped before the first video").listen()
    kernels = chosen_kernels(config.args, mesh.device)
    requests, settings = read_requests(config), build_sampling(config)
    reader = build_request_reader(config, settings)
    if reader is not None:
        for request in requests:
            reader.check(request)
    folder = Path(config.args.output_dir)
    with explaining_lack_of_memory(SAMPLING_REMEDY):
        pipeline = build_sampler(config, mesh, [request.prompt for request in requests])
        shape = (settings.num_frames, settings.height, settings.width)
        log.info("%d videos of %d frames, %dx%d", len(requests), *shape)
        try:
            with kernels:
                previews, problem = write_videos(
                    mesh, pipeline, requests, settings, folder, stop_request, reader
                )
        except Stopped as stop:
            count = sum((folder / f"{request.name}.mp4").exists() for request in requests)
            message = f"stopped; {count} of {len(requests)} videos are in {folder}"
            raise Stopped(stop.signal_number, message) from None
    wait_for_ranks(mesh)
    check_all_ranks(mesh, problem)
    gathered = {number: video for part in gather_pixels(mesh, previews) for number, video in part.items()}
    if mesh.rank == 0:
        videos = [gathered[number] for number in sorted(gathered)]
        write_contact_sheet(folder / "contact_sheet.png", videos, [request.prompt for request in requests])
        log.info("wrote %s", folder / "contact_sheet.png")


def write_videos(
    mesh: ProcessMesh,
    pipeline: VideoDiffusion,
    requests: Sequence[SampleRequest],
    settings: SamplingSettings,
    folder: Path,
    stop_request: StopRequest,
    reader: RequestReader | None = None,
) -> tuple[dict[int, Tensor], SatTrainError | None]:
    """Samples and writes this rank's share of the videos; each file is complete or absent.

    Returns:
        Frames of the videos for the contact sheet, by number, and the error that ended the work early.

    Raises:
        Stopped: A signal arrived.
    """
    previews: dict[int, Tensor] = {}
    queue = WorkQueue(mesh, "sample videos", len(requests))
    with StepBar(shown=mesh.rank == 0) as bar:
        for number in queue:
            request = requests[number]
            if stop_request:
                raise Stopped(signal.Signals[stop_request.signal_name], "")
            bar.begin(f"{request.name}.mp4", settings.steps)
            try:
                video = generate(pipeline, request, settings, bar.step, reader)
                if mesh.model_rank == 0:
                    write_mp4(folder / f"{request.name}.mp4", video, fps=settings.fps)
            except SatTrainError as error:
                queue.close()
                return previews, error
            previews[number] = spread_frames(video)
            log.info("wrote %s", folder / f"{request.name}.mp4")
    return previews, None


def read_requests(config: RunConfig) -> list[SampleRequest]:
    """Returns the requests of a run, from `args.prompt` or `args.input_file`."""
    args = config.args
    image = None if args.image is None else Path(args.image)
    takes_image = config.spec.takes_first_frames
    if args.prompt is None and args.input_file is not None and args.input_file.endswith(".jsonl"):
        names = read_fields_of_conditions(config)
        return read_request_rows(
            Path(args.input_file), fields=names, image_to_video=takes_image, image=image, seed=args.seed
        )
    if args.prompt is not None:
        lines = [("args.prompt", args.prompt)]
    else:
        assert args.input_file is not None, "the configuration ensures a prompt"
        lines = read_prompt_file(Path(args.input_file))
    return build_requests(lines, image_to_video=takes_image, image=image, seed=args.seed)


def build_sampler(config: RunConfig, mesh: ProcessMesh, captions: Sequence[str]) -> VideoDiffusion:
    """Builds the pipeline with the weights of `args.load`; T5 is gone before the transformer comes.

    Args:
        config: The configuration.
        mesh: The process mesh.
        captions: Of all videos.

    Ranks: all.
    """
    encoders = build_encoders(config, mesh.device, in_turn=turns_for_text(mesh))
    encoders.load(vae=False)
    has_texts = keep_captions(encoders, build_conditions(config, encoders), captions)
    dit = build_loaded_dit(config, mesh)
    encoders.load(text=not has_texts)
    return build_pipeline(config, dit=dit, encoders=encoders)


def build_loaded_dit(config: RunConfig, mesh: ProcessMesh) -> DiffusionTransformer:
    """Builds the transformer with the weights of `args.load`, averaged with `args.ema`, and their adapters.

    Rank, scale and layers of the adapters come from the weights, not from YAML.

    Ranks: all; rank 0 finds and hashes the weights.
    """
    args = config.args
    load = args.load
    assert load is not None, "the configuration ensures weights"
    located = on_rank_0(mesh, lambda: locate_weights(load, load_base=args.load_base))
    modules = args.load_modules or ()
    on_rank_0(mesh, lambda: check_module_files(modules, config, located.path))
    start = StartWeights(located, None, args.load_lora or (), args.lora_strength, modules)
    base, updates = read_weights_and_updates(start, ema=args.ema)
    dit = build_dit(
        config.spec, device=mesh.device, dtype=compute_dtype(args), initialize=False, with_adapters=False
    )
    weights = slice_weights(base, rank=mesh.model_rank, size=mesh.model_size)
    load_weights_once(dit, weights, mesh, may_lack=dit.derived_keys())
    if updates:
        add_adapters_for(dit, updates)
        scales = ", ".join(f"{scale:g}" for scale in scales_of(updates))
        log.info("LoRA adapters of %d layers, scale %s", len(updates), scales)
    log.info("weights from %s%s", base.where, ", averaged" if args.ema else "")
    dit.eval().requires_grad_(False)
    return dit


def generate(
    pipeline: VideoDiffusion,
    request: SampleRequest,
    settings: SamplingSettings,
    progress: OnStep,
    reader: RequestReader | None = None,
) -> Tensor:
    """Generates the video of a request: uint8 video_tchw."""
    sample = request_sample(request, settings) if reader is None else reader.sample(request)
    return generate_video(pipeline, settings, prompt=sample, seed=request.seed, progress=progress)


class StepBar:
    """Progress bar over the sampling steps of a video; shows nothing without a terminal.

    Args:
        shown: Whether this process shows it.
    """

    def __init__(self, *, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        is_on = shown and sys.stderr.isatty()
        self._bar = Progress(*columns, console=console(), transient=True, disable=not is_on)
        self._task = self._bar.add_task("")

    def __enter__(self) -> StepBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, description: str, steps: int) -> None:
        """Restarts the bar for the next video."""
        self._bar.reset(self._task, total=steps, description=description)

    def step(self, index: int, steps: int) -> None:
        """Advances the bar past the finished step."""
        self._bar.update(self._task, completed=index + 1)

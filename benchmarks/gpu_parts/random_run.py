"""Runs on random weights and encodings: what a step costs does not depend on the numbers in it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu_parts.check import Setting, release
from sat_train.config import RunConfig, load_run_config
from sat_train.data.batches import StepPosition
from sat_train.distributed.collectives import sum_over_data
from sat_train.distributed.processes import ProcessMesh
from sat_train.distributed.signals import StopRequest
from sat_train.encoding.build import build_encoders
from sat_train.encoding.encoded_batch import EncodedBatch
from sat_train.engine.build import build_engine
from sat_train.engine.compilation import compiles_blocks
from sat_train.engine.engine import TrainEngine
from sat_train.models.adapter import start_adapters
from sat_train.models.build import build_dit, compute_dtype
from sat_train.models.dit.sharding import full_shape, shard_weight
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.frozen_layers import hold_frozen_weights
from sat_train.models.kernels import chosen_kernels
from sat_train.models.recomputation import set_recomputation
from sat_train.models.trainable import select_configured
from sat_train.objective.build import build_pipeline
from sat_train.planning.gpu_memory import CONTEXT_BYTES, PhaseMemory
from sat_train.planning.planner import Planner
from sat_train.training.loop.step import TrainStep

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# one sample of a complete cache, and nothing besides training
_WORDS = (
    *("data.cache=require", "data.cache_dir=cache", "args.train_data=[unread]", "args.batch_size=1"),
    *("args.eval_interval=null", "args.valid_video_interval=null"),
)
_BATCHES = 8
SMALL = (
    *("data.params.max_num_frames=5", "data.params.video_size=[32,32]"),
    "model.network_config.params.num_layers=2",
)


def read_run(setting: Setting, model: str, recipe: str, *words: str) -> RunConfig:
    """Reads a run: the model and recipe that are named, or the embedded model at a small size."""
    if setting.tiny:
        model, words = "cogvideox_tiny", (*SMALL, *(word for word in words if "num_layers" not in word))
    files = [CONFIGS / f"model/{model}.yaml", CONFIGS / f"{recipe}.yaml"]
    device = "cuda" if setting.on_gpu else "cpu"
    more = [*_WORDS, f"args.device={device}", *words]
    return load_run_config([str(file) for file in files], more, purpose="check", check_paths=False)


def fill(
    module: nn.Module, mesh: ProcessMesh, *, deviation: Callable[[str, Tensor], float] = lambda *_: 0.02
) -> None:
    """Fills weights where they lie, with the same numbers on any mesh of such devices.

    Matrices get noise, biases zeros, norms ones.

    Args:
        module: The weights.
        mesh: The process mesh.
        deviation: Returns the standard deviation of the noise of a matrix, by its name.
    """
    generator = torch.Generator(mesh.device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            shape = full_shape(name, tuple(parameter.shape), mesh.model_size)
            whole = torch.empty(shape, device=mesh.device)
            whole.normal_(std=deviation(name, parameter), generator=generator)
            parameter.copy_(shard_weight(name, whole, rank=mesh.model_rank, size=mesh.model_size))


def build_random_dit(setting: Setting, config: RunConfig) -> DiffusionTransformer:
    """Builds the transformer of a run with random weights, and freezes what does not train.

    Ranks: all.
    """
    args, device = config.args, setting.mesh.device
    dit = build_dit(
        config.spec,
        device=device,
        dtype=compute_dtype(args),
        recompute=args.recompute,
        inputs_on_host=args.checkpoint_offload,
        initialize=False,
    )
    fill(dit, setting.mesh)
    start_adapters(dit, setting.mesh, seed=0)
    select_configured(dit, config.model)
    hold_frozen_weights(dit, device=device, quantization=args.quantize_base, swapped=args.block_swap)
    set_recomputation(dit, config, compiled=compiles_blocks(args, device))
    return dit


def random_batch(setting: Setting, config: RunConfig, *, position: int = 0) -> EncodedBatch:
    """Returns encodings of clips of the configuration's size, as the loader gives them.

    Args:
        setting: The rank.
        config: Size, and samples of a micro-batch.
        position: Samples consumed before; the same position has the same samples on any mesh.
    """
    data, count = config.require_data().params, config.args.batch_size
    latent = config.spec.latent(data.max_num_frames, *data.video_size)
    shape = (latent.frames, config.spec.out_channels, latent.height, latent.width)
    first, whole = position + setting.mesh.data_rank * count, setting.mesh.data_size * count
    indices = tuple(range(first, first + count))
    generators = [torch.Generator().manual_seed(index) for index in indices]
    mean = torch.stack([torch.randn(shape, generator=each) for each in generators])
    text_shape = (config.spec.text_length, config.spec.text_width)
    text = torch.stack([torch.randn(text_shape, generator=each) for each in generators])
    batch = EncodedBatch(
        encodings={"clip": {"mean": mean, "logvar": torch.full_like(mean, -4)}, "text": {"text": text}},
        clip_ids=tuple(f"{index}.mp4" for index in indices),
        sample_indices=indices,
        num_shown=(data.max_num_frames,) * count,
        step_positions=tuple(StepPosition(position // whole, index - position, whole) for index in indices),
    )
    return batch.pin_memory() if setting.on_gpu else batch


class _Batches(Iterator[EncodedBatch]):
    """Some batches again and again; the samples of the next are known, as a loader's are.

    Args:
        batches: The batches.
    """

    def __init__(self, batches: Sequence[EncodedBatch]) -> None:
        self._batches, self._taken = batches, 0

    def __next__(self) -> EncodedBatch:
        batch = self._batches[self._taken % len(self._batches)]
        self._taken += 1
        return batch

    def upcoming(self) -> tuple[int, ...]:
        """Returns the samples of the next batch."""
        return self._batches[self._taken % len(self._batches)].sample_indices


@dataclass(frozen=True)
class RandomRun:
    """A run as training has it, on random weights.

    Args:
        config: Its configuration.
        engine: The engine around the transformer.
        train_step: Its steps.
    """

    config: RunConfig
    engine: TrainEngine
    train_step: TrainStep


@contextmanager
def open_run(setting: Setting, config: RunConfig) -> Iterator[RandomRun]:
    """Builds a run, and gives its memory back afterwards, however that ends.

    Ranks: all.
    """
    dit = build_random_dit(setting, config)
    pipeline = build_pipeline(config, dit=dit, encoders=build_encoders(config, setting.mesh.device))
    engine = build_engine(config, dit, setting.mesh)

    consumed = config.args.batch_size * setting.mesh.data_size
    # drawn before: a loader's workers would, while the GPU computes
    batches = _Batches(
        [random_batch(setting, config, position=number * consumed) for number in range(_BATCHES)]
    )

    def compute_loss(batch: EncodedBatch) -> Tensor:
        loss: Tensor = pipeline.training_loss(batch, network=engine).loss
        return loss

    train_step = TrainStep(
        engine=engine,
        compute_loss=compute_loss,
        batches=batches,
        mesh=setting.mesh,
        stop_request=StopRequest(),
        prepare_next=lambda: pipeline.draws.draw(batches.upcoming()),
    )
    try:
        yield RandomRun(config, engine, train_step)
    finally:
        engine.close()


@dataclass(frozen=True)
class Steps:
    """Some steps of a run.

    Args:
        losses: Mean loss over this rank's samples.
        norms: Norm of the gradient.
        applied: Steps that updated the weights.
        first_s: Seconds of the first, which compiles.
        median_s: Median of the others, without the second.
    """

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    applied: int
    first_s: float
    median_s: float


def run_steps(setting: Setting, run: RandomRun, count: int, *, rate: float = 1e-4) -> Steps:
    """Runs steps and times each.

    Ranks: all.
    """
    results, seconds = [], []
    with chosen_kernels(run.config.args, setting.mesh.device):
        for number in range(1, count + 1):
            start = time.perf_counter()
            results.append(run.train_step.step(number, rate))
            setting.wait()
            seconds.append(time.perf_counter() - start)
    losses, norms = [float(result.loss) for result in results], [result.grad_norm for result in results]
    applied = sum(result.applied for result in results)
    median = statistics.median(seconds[2:] or seconds)
    return Steps(tuple(losses), tuple(norms), applied, seconds[0], median)


@dataclass(frozen=True)
class Measured:
    """A run's first steps.

    Args:
        steps: The steps, with losses of all ranks.
        peak: Bytes of the GPU at most on this rank; 0 on a CPU.
    """

    steps: Steps
    peak: float


def measure_steps(setting: Setting, config: RunConfig, count: int) -> Measured:
    """Builds a run, runs its first steps and forgets it.

    Ranks: all.
    """
    with open_run(setting, config) as run:
        if setting.on_gpu:  # building takes another peak than training
            torch.cuda.reset_peak_memory_stats(setting.mesh.device)
        steps = run_steps(setting, run, count)
    losses = torch.tensor(steps.losses, device=setting.mesh.device)
    mean = sum_over_data(setting.mesh, losses) / setting.mesh.data_size
    peak = float(torch.cuda.max_memory_allocated(setting.mesh.device)) if setting.on_gpu else 0.0
    del run
    release()
    return Measured(replace(steps, losses=tuple(mean.tolist())), peak)


def planned_peak(setting: Setting, config: RunConfig) -> float:
    """Returns the bytes of a step as the allocator counts them, without context and libraries."""
    return step_bytes(Planner(setting.card, setting.mesh.world_size).phases(config))


def step_bytes(phases: Sequence[PhaseMemory]) -> float:
    """Returns the bytes of the step among planned phases, without context and libraries."""
    step = next(phase for phase in phases if phase.phase == "step")
    return step.total - CONTEXT_BYTES

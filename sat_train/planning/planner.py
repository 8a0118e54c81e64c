"""The plan of a run: memory by phase, time of a step, disk, hours; and what to change if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from sat_train.config import RunConfig
from sat_train.config.hardware import Hardware
from sat_train.engine.owned import row_length
from sat_train.models.build import compute_dtype, encoder_dtype
from sat_train.planning.counting import (
    Work,
    count_peak,
    count_work,
    peak_of_decoding,
    peak_of_encoding,
    work_of_encoding,
)
from sat_train.planning.duration import (
    HOST_COPY_GBPS,
    StepTime,
    communication_seconds,
    computing_seconds,
    encoding_seconds,
    optimizer_seconds,
)
from sat_train.planning.gpu_memory import (
    CONTEXT_BYTES,
    MASTER_BYTES,
    PhaseMemory,
    StateMemory,
    Weights,
    count_states,
    count_weights,
    encoder_bytes,
    layout_stage,
)
from sat_train.training.run_data import samples_videos

_GIB = 2**30
T = TypeVar("T")
_LEAST_SAVING = 0.01  # of memory, for which a rung is worth its words
_WRITING_GBPS = 0.3  # of a checkpoint, with its hash: docs/benchmarks.md


@dataclass(frozen=True)
class Plan:
    """Needs of one run; bytes and seconds of one rank where nothing else is said.

    Args:
        hardware: The card.
        gpus: Number of cards.
        data_ranks: Ranks with batches of their own.
        weights: Weights of the transformer.
        trained: Those that train.
        tokens: Of one sample, text included.
        samples: Of one optimizer step, on all ranks.
        phases: Memory by phase.
        step: Time of one optimizer step.
        mfu: Share of the card's peak that the model's FLOPs make of the step.
        tflops: FLOPs of the model of one step and rank, in 1e12.
        checkpoint_bytes: One checkpoint on disk, of all ranks.
        cached_clip_bytes: One clip in the cache.
        steps: Optimizer steps of the run; None where the configuration counts epochs.
        hours: Of the run with validations and saves; None likewise.
    """

    hardware: Hardware
    gpus: int
    data_ranks: int
    weights: int
    trained: int
    tokens: int
    samples: int
    phases: tuple[PhaseMemory, ...]
    step: StepTime
    mfu: float
    tflops: float
    checkpoint_bytes: float
    cached_clip_bytes: float
    steps: int | None
    hours: float | None

    @property
    def peak(self) -> PhaseMemory:
        """The phase that takes the most memory of a GPU."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """True where every phase fits the card."""
        return self.peak.total <= self.hardware.memory_gib * _GIB

    @property
    def samples_per_second(self) -> float:
        """Samples that all ranks train on in a second."""
        return self.samples / self.step.total


@dataclass
class Planner:
    """Plans runs on one kind of card; what two runs have in common is counted once.

    Args:
        card: The card.
        gpus: Number of cards.
    """

    card: Hardware
    gpus: int
    _known: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def plan(self, config: RunConfig) -> Plan:
        """Plans a run."""
        args, spec = config.args, config.spec
        data, data_ranks = config.require_data().params, self._data_ranks(config)
        weights = self._once(config, count_weights)
        tokens = spec.tokens(spec.latent(data.max_num_frames, *data.video_size))
        step = self._step(config, weights, data_ranks)
        samples = args.batch_size * args.gradient_accumulation_steps
        flops = samples * spec.training_flops(tokens, trains_base=not config.freezes_base)
        checkpoint = _checkpoint_bytes(config, weights)
        return Plan(
            hardware=self.card,
            gpus=self.gpus,
            data_ranks=data_ranks,
            weights=weights.transformer,
            trained=weights.num_trained,
            tokens=tokens,
            samples=samples * data_ranks,
            phases=self.phases(config),
            step=step,
            mfu=flops / step.total / (self.card.peak_tflops * 1e12),
            tflops=flops / 1e12,
            checkpoint_bytes=checkpoint,
            cached_clip_bytes=_cached_clip_bytes(config),
            steps=args.train_iters,
            hours=self._hours(config, step, checkpoint / data_ranks, data_ranks),
        )

    def phases(self, config: RunConfig) -> tuple[PhaseMemory, ...]:
        """Returns the memory of each phase of a run."""
        weights = self._once(config, count_weights)
        states = count_states(config, weights, data_ranks=self._data_ranks(config))
        return tuple(self._phases(config, weights, states))

    def _data_ranks(self, config: RunConfig) -> int:
        return max(self.gpus // config.args.model_parallel_size, 1)

    def _phases(self, config: RunConfig, weights: Weights, states: StateMemory) -> Iterator[PhaseMemory]:
        args, encoders = config.args, encoder_bytes(config, weights)
        resident = encoders if _needs_encoders(config) else 0.0
        yield PhaseMemory("load", weights=states.weights, encoders=resident, host=resident)
        if resident and _forgets_text_encoder(config):
            resident -= encoder_dtype(args).itemsize * weights.text_encoder
        yield PhaseMemory(
            "precompute", activations=self._once(config, peak_of_encoding), encoders=encoders, host=encoders
        )
        training = PhaseMemory(
            "step",
            weights=states.weights,
            gradients=states.gradients,
            optimizer=states.optimizer,
            buffers=CONTEXT_BYTES + states.buffers,
            encoders=resident,
            host=states.offloaded + self._copy_of_saves(config, weights, states),
        )
        passes = self._peak(config, args.batch_size)
        yield replace(training, activations=max(passes, states.update))
        if args.eval_interval is not None:
            forward = self._peak(config, args.eval_batch_size or args.batch_size, training=False)
            yield replace(training, phase="validation", activations=forward)
        if samples_videos(config):
            most = max(self._peak(config, 2, training=False), self._once(config, peak_of_decoding))
            yield replace(training, phase="videos", activations=most)
        if args.save is not None:
            gathered = _saved_weights_bytes(config, weights) if args.zero_stage == 3 else 0.0
            yield replace(training, phase="save", host=training.host + gathered)

    def _copy_of_saves(self, config: RunConfig, weights: Weights, states: StateMemory) -> float:
        """Returns the bytes of the copy from which the first rank saves while training continues."""
        if config.args.save is None or config.args.async_save == "off":
            return 0.0
        owned = states.optimizer + states.offloaded
        data_ranks = self._data_ranks(config)
        if layout_stage(config, data_ranks) == 0:
            owned = (owned + MASTER_BYTES * weights.num_trained) / data_ranks
        return _saved_weights_bytes(config, weights) + owned

    def _step(self, config: RunConfig, weights: Weights, data_ranks: int) -> StepTime:
        args = config.args
        linear, attention, elementwise = computing_seconds(self._work(config, args.batch_size), self.card)
        passes, samples = args.gradient_accumulation_steps, args.batch_size * args.gradient_accumulation_steps
        encoding = 0.0
        if config.require_data().cache == "off":
            work, text_tokens = self._once(config, work_of_encoding), config.spec.text.max_length
            encoding = samples * encoding_seconds(work, weights, self.card, text_tokens=text_tokens)
        share = row_length(weights.trained, data_ranks if args.zero_stage else 1)
        return StepTime(
            linear=passes * linear,
            attention=passes * attention,
            elementwise=passes * elementwise,
            communication=communication_seconds(
                config, weights, self.card, data_ranks=data_ranks, gpus=self.gpus
            ),
            optimizer=optimizer_seconds(config, self.card, elements=share),
            encoding=encoding,
        )

    def _hours(self, config: RunConfig, step: StepTime, written: float, data_ranks: int) -> float | None:
        args = config.args
        if args.train_iters is None:
            return None
        seconds = args.train_iters * step.total
        if args.eval_interval is not None:
            batch = args.eval_batch_size or args.batch_size
            forward = sum(computing_seconds(self._work(config, batch, training=False), self.card))
            batches = -(-args.eval_iters // data_ranks)
            seconds += args.train_iters // args.eval_interval * batches * args.eval_timesteps * forward
        if args.save is not None:
            rate = _WRITING_GBPS if args.async_save == "off" else HOST_COPY_GBPS
            seconds += -(-args.train_iters // args.save_interval) * written / (rate * 1e9)
        return seconds / 3600

    def _peak(self, config: RunConfig, batch_size: int, *, training: bool = True) -> float:
        return self._once(config, count_peak, *_recompute(config), batch_size=batch_size, training=training)

    def _work(self, config: RunConfig, batch_size: int, *, training: bool = True) -> Work:
        return self._once(config, count_work, *_recompute(config), batch_size=batch_size, training=training)

    def _once(self, config: RunConfig, count: Callable[..., T], *depends_on: object, **options: Any) -> T:
        data = config.require_data().params
        model = (repr(config.model), data.max_num_frames, data.video_size, compute_dtype(config.args))
        key = (count, *model, *depends_on, *options.items())
        if key not in self._known:
            self._known[key] = count(config, **options)
        known: T = self._known[key]
        return known


def _recompute(config: RunConfig) -> tuple[object, ...]:
    return config.args.checkpoint_activations, config.args.checkpoint_every


def _needs_encoders(config: RunConfig) -> bool:
    return config.require_data().cache == "off" or samples_videos(config)


def _forgets_text_encoder(config: RunConfig) -> bool:
    """Returns whether T5 is freed once the prompts of the validation videos are encoded."""
    return config.require_data().cache != "off" and not config.model.conditions


def _checkpoint_bytes(config: RunConfig, weights: Weights) -> float:
    """Returns the bytes of weights in half precision, and of masters, states and average in fp32.

    A run with a frozen base leaves it out.
    """
    average = 4 if config.args.ema_decay is not None else 0
    states = 4 + average + config.deepspeed.optimizer.params.bytes_per_weight()
    return _saved_weights_bytes(config, weights) + states * weights.num_trained


def _saved_weights_bytes(config: RunConfig, weights: Weights) -> float:
    """Returns the bytes of the weights in the dtype of computation that a checkpoint holds."""
    kept = weights.num_trained if config.freezes_base else weights.transformer
    return compute_dtype(config.args).itemsize * kept


def _cached_clip_bytes(config: RunConfig) -> float:
    """Returns the bytes of the posterior's moments and of the caption's embedding of a clip."""
    spec, data = config.spec, config.require_data().params
    latent = spec.latent(data.max_num_frames, *data.video_size)
    moments = 2 * spec.out_channels * latent.height * latent.width
    frames = latent.frames + (1 if "image" in spec.conditions else 0)
    text = spec.text.max_length * spec.text_width * compute_dtype(config.args).itemsize
    return moments * frames * encoder_dtype(config.args).itemsize + text


@dataclass(frozen=True)
class Rung:
    """One way to need less memory, on top of the rungs before it.

    Args:
        meaning: What it does, and at what price.
        words: What to type.
        files: Configuration files to add.
    """

    meaning: str
    words: tuple[str, ...]
    files: tuple[str, ...] = ()


def memory_ladder(config: RunConfig, *, gpus: int) -> Iterator[Rung]:
    """Yields the ways to need less memory that this configuration leaves, the cheapest first."""
    args, stage = config.args, config.args.zero_stage
    words: tuple[str, ...]
    if _needs_encoders(config):
        words = ("data.cache=require", "data.cache_dir=cache", "args.valid_video_interval=null")
        yield Rung("encode beforehand, no validation videos: T5 and VAE are not loaded", words)
    policies = ("off", "attention", "full") if config.spec.adapter else ("off", "gemm", "attention", "full")
    at = policies.index(args.checkpoint_activations) if args.checkpoint_activations in policies else 0
    for policy in policies[at + 1 :]:
        words = (f"args.checkpoint_activations={policy}", "args.checkpoint_every=1")
        yield Rung("recompute more in the backward pass; slower", words)
    if args.batch_size > 1:
        accumulated = args.batch_size * args.gradient_accumulation_steps
        words = ("args.batch_size=1", f"args.gradient_accumulation_steps={accumulated}")
        yield Rung("one sample at a time, as many a step as before", words)
    yield from _rungs_of_the_states(config, gpus)
    if config.spec.adapter is None:
        yield Rung("train adapters instead of all weights", (), ("configs/lora.yaml",))
    if config.deepspeed.zero_optimization.offload_optimizer.device == "none":
        offload = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
        words = (f"args.zero_stage={max(stage, 2)}", "deepspeed.optimizer.type=AdamW", offload)
        yield Rung("optimizer states in host memory; much slower", words)


def _rungs_of_the_states(config: RunConfig, gpus: int) -> Iterator[Rung]:
    stage, optimizer = config.args.zero_stage, config.deepspeed.optimizer.type
    shares = gpus > config.args.model_parallel_size
    if shares and stage < 2:
        yield Rung("divide gradients and states over the GPUs", ("args.zero_stage=2",))
    if optimizer in ("Adam", "AdamW") and stage < 3 and config.args.model_parallel_size == 1:
        yield Rung("moments in 8 bits; needs bitsandbytes", ("deepspeed.optimizer.type=AdamW8bit",))
    if shares and stage < 3:
        words = ("args.zero_stage=3", "deepspeed.optimizer.type=AdamW", "args.compile=off")
        yield Rung("divide the weights over the GPUs too; slower", words)


@dataclass(frozen=True)
class Climb:
    """A rung with what the run then takes.

    Args:
        rung: The rung.
        plan: The run with this rung and those before it.
    """

    rung: Rung
    plan: Plan


def climb_down(
    planner: Planner, config: RunConfig, reload: Callable[[Sequence[Rung]], RunConfig]
) -> list[Climb]:
    """Returns the rungs that a run has to take until it fits, each with its plan; all if none makes it fit.

    A rung counts where it lowers the highest phase; one that does not is tried again after the others.

    Args:
        planner: The planner of the card.
        config: The run that does not fit.
        reload: Reads the configuration with the words and files of some rungs.
    """
    taken: list[Climb] = []
    plan = planner.plan(config)
    while not plan.fits:
        climb = _next_rung(planner, config, plan, [each.rung for each in taken], reload)
        if climb is None:
            break
        taken.append(climb)
        plan, config = climb.plan, reload([each.rung for each in taken])
    return taken


def _next_rung(
    planner: Planner,
    config: RunConfig,
    plan: Plan,
    taken: Sequence[Rung],
    reload: Callable[[Sequence[Rung]], RunConfig],
) -> Climb | None:
    for rung in memory_ladder(config, gpus=planner.gpus):
        changed = reload([*taken, rung])
        most = max(phase.total for phase in planner.phases(changed))
        if most < plan.peak.total * (1 - _LEAST_SAVING):
            return Climb(rung, planner.plan(changed))
    return None

"""The plan of a run: memory by phase, time of a step, disk, hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from sat_train.config import RunConfig
from sat_train.config.hardware import Hardware
from sat_train.config.summary import describe_activations
from sat_train.engine.compilation import compiles_on_gpus
from sat_train.engine.owned import row_length
from sat_train.models.build import compute_dtype
from sat_train.models.meta_models import counting_key
from sat_train.models.recomputation import blocks_differ, recomputed_widths, without_recomputation
from sat_train.planning.cache_size import count_clip_bytes, count_condition_bytes
from sat_train.planning.counting import (
    Count,
    count_captions,
    count_decoding,
    count_encoding,
    count_passes,
)
from sat_train.planning.duration import (
    HOST_COPY_GBPS,
    StepTime,
    communication_seconds,
    computing_seconds,
    elementwise_factor,
    encoding_seconds,
    optimizer_seconds,
    summing_seconds,
    swapping_seconds,
)
from sat_train.planning.gpu_memory import (
    CONTEXT_BYTES,
    MASTER_BYTES,
    EncoderMemory,
    PhaseMemory,
    StateMemory,
    Weights,
    count_encoders,
    count_states,
    count_weights,
    layout_stage,
)
from sat_train.training.run_data import samples_videos

_GIB = 2**30
T = TypeVar("T")
_WRITING_GBPS = 0.3  # of a checkpoint, with its hash: docs/benchmarks.md


@dataclass(frozen=True)
class Plan:
    """Needs of one run; bytes and seconds of one rank where nothing else is said.

    Args:
        hardware: The card.
        gpus: Number of cards.
        data_ranks: Ranks with batches of their own.
        weights: Weights of the transformer on a rank.
        trained: Those that train.
        compiled: Blocks are compiled.
        activations: What is kept of them for the backward pass, in words.
        tokens: Of one sample, text included.
        samples: Of one optimizer step, on all ranks.
        phases: Memory by phase.
        step: Time of one optimizer step.
        mfu: Share of the card's peak that the model's FLOPs make of the step.
        tflops: FLOPs of the model of one step and rank, in 1e12.
        checkpoint_bytes: One checkpoint on disk, of all ranks.
        encoded_clip_s: Seconds in which one GPU encodes a clip and its caption.
        cached_clip_bytes: A clip and its caption in the cache, with the encodings of `model.conditions`.
        uncounted_conditions: Conditions whose encodings come on top.
        steps: Optimizer steps of the run; None where the configuration counts epochs.
        hours: Of the run with validations and saves; None likewise.
    """

    hardware: Hardware
    gpus: int
    data_ranks: int
    weights: int
    trained: int
    compiled: bool
    activations: str
    tokens: int
    samples: int
    phases: tuple[PhaseMemory, ...]
    step: StepTime
    mfu: float
    tflops: float
    checkpoint_bytes: float
    encoded_clip_s: float
    cached_clip_bytes: float
    uncounted_conditions: tuple[str, ...]
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
        data_ranks = self._data_ranks(config)
        weights = self._weights(config)
        tokens = self._tokens(config)
        step = self.step_time(config)
        samples = args.batch_size * args.gradient_accumulation_steps
        shared_by = args.model_parallel_size
        flops = samples * spec.training_flops(tokens, trains_base=not config.freezes_base) / shared_by
        checkpoint = shared_by * _checkpoint_bytes(config, weights)
        fields = repr(config.require_data().fields)
        conditions = self._once(config, count_condition_bytes, fields)
        return Plan(
            hardware=self.card,
            gpus=self.gpus,
            data_ranks=data_ranks,
            weights=weights.transformer,
            trained=weights.num_trained,
            compiled=compiles_on_gpus(args),
            activations=describe_activations(args),
            tokens=tokens,
            samples=samples * data_ranks,
            phases=self.phases(config),
            step=step,
            mfu=flops / step.total / (self.card.peak_tflops * 1e12),
            tflops=flops / 1e12,
            checkpoint_bytes=checkpoint,
            encoded_clip_s=self._encoding_seconds(config, weights),
            cached_clip_bytes=count_clip_bytes(config) + conditions.total,
            uncounted_conditions=conditions.uncounted,
            steps=args.train_iters,
            hours=self._hours(config, step, checkpoint / data_ranks / shared_by, data_ranks),
        )

    def phases(self, config: RunConfig) -> tuple[PhaseMemory, ...]:
        """Returns the memory of each phase of a run."""
        weights = self._weights(config)
        states = count_states(config, weights, data_ranks=self._data_ranks(config))
        return tuple(self._phases(config, weights, states))

    def _tokens(self, config: RunConfig) -> int:
        data = config.require_data().params
        return config.spec.tokens(config.spec.latent(data.max_num_frames, *data.video_size))

    def _data_ranks(self, config: RunConfig) -> int:
        return max(self.gpus // config.args.model_parallel_size, 1)

    def training_peak(self, config: RunConfig) -> float:
        """Returns the bytes of one GPU in the largest phase of training: step, validation, videos or save."""
        weights = self._weights(config)
        states = count_states(config, weights, data_ranks=self._data_ranks(config))
        return max(phase.total for phase in self._training_phases(config, weights, states))

    def _phases(self, config: RunConfig, weights: Weights, states: StateMemory) -> Iterator[PhaseMemory]:
        args, encoders = config.args, count_encoders(config, weights)
        loaded = _loaded_encoders(config, encoders)
        read = compute_dtype(args).itemsize * weights.transformer if weights.held else 0.0
        host = loaded.gpu + loaded.host + states.swapped + read
        yield PhaseMemory("load", weights=states.weights, encoders=loaded.gpu, host=host)
        yield self._precompute(config, encoders)
        yield from self._training_phases(config, weights, states)

    def _training_phases(
        self, config: RunConfig, weights: Weights, states: StateMemory
    ) -> Iterator[PhaseMemory]:
        args, loaded = config.args, _loaded_encoders(config, count_encoders(config, weights))
        if _forgets_text_encoder(config):
            loaded = replace(loaded, text=0.0, host=0.0)
        on_host = loaded.host + states.offloaded + states.offloaded_copies + states.swapped
        training = PhaseMemory(
            "step",
            weights=states.weights,
            gradients=states.gradients,
            optimizer=states.optimizer,
            buffers=CONTEXT_BYTES + states.buffers,
            encoders=loaded.gpu,
            host=on_host + self._copy_of_saves(config, weights, states),
        )
        passes = self._passes(config, args.batch_size).peak
        inputs = _inputs_on_host(config, self._tokens(config))
        yield replace(training, activations=max(passes, states.update), host=training.host + inputs)
        if args.eval_interval is not None:
            forward = self._passes(config, args.eval_batch_size or args.batch_size, training=False).peak
            yield replace(training, phase="validation", activations=forward)
        if samples_videos(config):
            denoising, decoding = self._passes(config, 2, training=False), self._once(config, count_decoding)
            yield replace(training, phase="videos", activations=max(denoising.peak, decoding.peak))
        if args.save is not None:
            yield replace(training, phase="save")

    def _precompute(self, config: RunConfig, encoders: EncoderMemory) -> PhaseMemory:
        """Returns the larger of captions, which come first, and clips, for which T5 is freed."""
        host = encoders.gpu + encoders.host
        clips = PhaseMemory(
            "precompute",
            activations=self._once(config, count_encoding).peak,
            encoders=encoders.gpu if config.model.conditions else encoders.vae,
            host=host,
        )
        if not encoders.text:
            return clips
        peak = self._once(config, count_captions, config.require_data().captions_at_once).peak
        captions = PhaseMemory("precompute", activations=peak, encoders=encoders.gpu, host=host)
        return max(captions, clips, key=lambda phase: phase.total)

    def _copy_of_saves(self, config: RunConfig, weights: Weights, states: StateMemory) -> float:
        """Returns the bytes of the copy from which the first rank saves while training continues."""
        if config.args.save is None or config.args.async_save == "off":
            return 0.0
        owned = states.optimizer + states.offloaded
        data_ranks = self._data_ranks(config)
        if layout_stage(config, data_ranks) == 0:
            owned = (owned + MASTER_BYTES * weights.num_trained) / data_ranks
        sharing = data_ranks if config.args.zero_stage == 3 else 1
        return _saved_weights_bytes(config, weights) / sharing + owned

    def step_time(self, config: RunConfig) -> StepTime:
        """Returns the seconds of one optimizer step."""
        args, weights, data_ranks = config.args, self._weights(config), self._data_ranks(config)
        work = self._passes(config, args.batch_size).work
        linear, attention, elementwise = self._computing_seconds(config, args.batch_size)
        passes, samples = args.gradient_accumulation_steps, args.batch_size * args.gradient_accumulation_steps
        encoding = 0.0
        if config.require_data().cache == "off":
            encoding = samples * self._encoding_seconds(config, weights)
        share = row_length(weights.trained, data_ranks if args.zero_stage else 1)
        computing = passes * (linear + attention + elementwise)
        copied = 2 * passes * (weights.host_bytes + _inputs_on_host(config, self._tokens(config)))
        return StepTime(
            linear=passes * linear,
            attention=passes * attention,
            elementwise=passes * elementwise,
            communication=communication_seconds(
                config, weights, self.card, data_ranks=data_ranks, gpus=self.gpus
            )
            + passes * summing_seconds(work.summed_bytes, self.card, ranks=args.model_parallel_size),
            optimizer=optimizer_seconds(config, self.card, elements=share),
            encoding=encoding,
            swapping=swapping_seconds(copied, computing=computing),
        )

    def _encoding_seconds(self, config: RunConfig, weights: Weights) -> float:
        return encoding_seconds(
            self._once(config, count_encoding).work,
            weights,
            self.card,
            text_tokens=config.spec.text.max_length,
            text_on_host=config.args.text_encoder_device == "cpu",
        )

    def _computing_seconds(
        self, config: RunConfig, batch_size: int, *, training: bool = True
    ) -> tuple[float, float, float]:
        work = self._passes(config, batch_size, training=training).work
        return computing_seconds(work, self.card, elementwise_factor=elementwise_factor(config))

    def _hours(self, config: RunConfig, step: StepTime, written: float, data_ranks: int) -> float | None:
        args = config.args
        if args.train_iters is None:
            return None
        seconds = args.train_iters * step.total
        if args.eval_interval is not None:
            batch = args.eval_batch_size or args.batch_size
            forward = sum(self._computing_seconds(config, batch, training=False))
            batches = -(-args.eval_iters // data_ranks)
            seconds += args.train_iters // args.eval_interval * batches * args.eval_timesteps * forward
        if args.save is not None:
            waited = written / (_WRITING_GBPS * 1e9)
            if args.async_save != "off":  # copied during the passes of the next step
                waited = max(0.0, written / (HOST_COPY_GBPS * 1e9) - step.total)
            seconds += -(-args.train_iters // args.save_interval) * waited
        return seconds / 3600

    def _weights(self, config: RunConfig) -> Weights:
        return self._once(config, count_weights, config.args.quantize_base, config.args.block_swap)

    def _passes(self, config: RunConfig, batch_size: int, *, training: bool = True) -> Count:
        if not training:
            config = without_recomputation(config)
        plain = None
        if blocks_differ(config):
            plain = self._passes(without_recomputation(config), batch_size).work
        return self._once(
            config,
            count_passes,
            *_settings_of_passes(config),
            batch_size=batch_size,
            training=training,
            compiled=training and compiles_on_gpus(config.args),
            plain=plain,
        )

    def _once(self, config: RunConfig, count: Callable[..., T], *depends_on: object, **options: Any) -> T:
        key = (count, *counting_key(config), *depends_on, *options.items())
        if key not in self._known:
            self._known[key] = count(config, **options)
        known: T = self._known[key]
        return known


def _loaded_encoders(config: RunConfig, encoders: EncoderMemory) -> EncoderMemory:
    return encoders if needs_encoders(config) else EncoderMemory(0.0, 0.0, 0.0)


def _settings_of_passes(config: RunConfig) -> tuple[object, ...]:
    args = config.args
    return (
        args.recompute,
        args.checkpoint_every,
        args.checkpoint_budget,
        args.batch_size,
        args.checkpoint_offload,
        args.quantize_base,
    )


def _inputs_on_host(config: RunConfig, tokens: int) -> float:
    """Returns the bytes of host memory that inputs of recomputed blocks take."""
    args = config.args
    widths = sum(recomputed_widths(config)) if args.checkpoint_offload else 0
    return args.batch_size * tokens * widths * compute_dtype(args).itemsize


def needs_encoders(config: RunConfig) -> bool:
    """Returns whether training loads text encoder and autoencoder."""
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

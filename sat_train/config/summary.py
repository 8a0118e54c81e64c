"""Summary of a run in a dozen lines, at the end of `sat-train check` and the start of a training log."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sat_train.config.facts import RunFacts
from sat_train.config.learning_rate import build_learning_rate
from sat_train.config.paths import shorten_assets
from sat_train.config.run import RunConfig
from sat_train.config.schema.args import ArgsConfig
from sat_train.config.schema.data_section import DataConfig


def summarize(config: RunConfig, facts: RunFacts) -> str:
    """Returns the summary, one line per subject, and a note for each setting that looks unintended."""
    lines = [f"  {subject:<11} {text}" for subject, text in _subjects(config, facts)]
    notes = [f"  note: {text}" for text in _doubts(config, facts)]
    return "\n".join([*lines, *notes])


def _subjects(config: RunConfig, facts: RunFacts) -> Iterator[tuple[str, str]]:
    yield "model", _model(config)
    yield "weights", str(shorten_assets(config.args.load)) if config.args.load else "none: random"
    if config.args.mode == "inference":
        return
    yield "trains", _trained(config)
    if config.data is not None:
        yield "data", _data(config, facts)
        yield "samples", _samples(config.data)
        yield (
            "cache",
            "off" if config.data.cache == "off" else f"{config.data.cache}, {config.data.cache_dir}",
        )
    yield "batch", _batch(config, facts)
    yield "length", _length(config, facts)
    yield "optimizer", _optimizer(config)
    yield "lr", _rate(config, facts)
    yield "memory", _memory(config)
    yield "validation", _validation(config)
    yield "checkpoints", _checkpoints(config)


def _model(config: RunConfig) -> str:
    task = "image to video" if "image" in config.spec.conditions else "text to video"
    precision = "bf16" if config.args.bf16 else "fp16" if config.args.fp16 else "fp32"
    return f"{task}, {config.spec.layers} layers of width {config.spec.width}, {precision}"


def _trained(config: RunConfig) -> str:
    adapter = config.spec.adapter
    if adapter is None:
        frozen = config.model.not_trainable_prefixes
        if "all" in frozen:
            named = ["weights that model.train names"] * bool(config.model.train)
            return ", ".join([*(f"module {name}" for name in config.model.modules), *named]) or "nothing"
        return "all weights of the transformer" + (f" but {', '.join(frozen)}" if frozen else "")
    name = "LoRA" if adapter.target == "Lora" else adapter.target
    params = adapter.params
    scales = params.scales(config.spec.linear_layers())
    scale = " to ".join(f"{scale:.3g}" for scale in dict.fromkeys((scales[0], scales[-1])))
    patterns = ", patterns for single layers" if params.rank_pattern or params.alpha_pattern else ""
    return f"{name} of rank {params.r}, alpha {params.lora_alpha:g}{patterns}: scale {scale}"


def _data(config: RunConfig, facts: RunFacts) -> str:
    sets = ", ".join(str(shorten_assets(path)) for path in config.args.train_data or ()) or "none"
    if facts.clips is None:
        return sets
    return f"{facts.clips.train:,} clips, {facts.clips.valid:,} for validation: {sets}"


def _samples(data: DataConfig) -> str:
    params = data.params
    height, width = params.video_size
    shape = f"{params.max_num_frames} frames of {height}x{width} at {params.fps:g} a second"
    return f"{shape}{' and buckets' if params.buckets is not None else ''}; window {params.window}"


def _batch(config: RunConfig, facts: RunFacts) -> str:
    args = config.args
    parts = f"{args.batch_size} a GPU x {args.gradient_accumulation_steps} accumulated"
    if facts.data_ranks is None:
        return f"{parts} x the number of GPUs"
    return f"{parts} x {_count(facts.data_ranks, 'GPU')} = {_samples_a_step(config, facts.data_ranks)} a step"


def _samples_a_step(config: RunConfig, data_ranks: int) -> int:
    return config.args.batch_size * config.args.gradient_accumulation_steps * data_ranks


def _length(config: RunConfig, facts: RunFacts) -> str:
    if config.args.epochs is not None:
        epochs = _count(config.args.epochs, "epoch")
        return epochs if facts.steps is None else f"{epochs} = {_count(facts.steps, 'step')}"
    steps = _count(config.args.train_iters or 0, "step")
    if facts.clips is None or facts.data_ranks is None or not facts.clips.train:
        return steps
    samples = (config.args.train_iters or 0) * _samples_a_step(config, facts.data_ranks)
    return f"{steps} = {_count(samples, 'sample')} = {samples / facts.clips.train:,.1f} epochs"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _optimizer(config: RunConfig) -> str:
    args = config.args
    clipping = f"gradients clipped at {args.clip_grad:g}" if args.clip_grad else "no clipping"
    return f"{config.deepspeed.optimizer.type}, lr {args.lr:g}, {clipping}"


def _rate(config: RunConfig, facts: RunFacts) -> str:
    args = config.args
    steps = facts.steps or args.train_iters
    shape: str = args.lr_decay_style
    shape += "" if shape == "constant" else f" to {args.lr_decay_ratio:g}x"
    if steps is None:
        return f"warm-up {args.warmup:g}, {shape}"
    return f"{build_learning_rate(args, steps).describe(steps)}; {shape}"


def _memory(config: RunConfig) -> str:
    args = config.args
    parts = [f"ZeRO-{args.zero_stage}"]
    parts += [f"activations {describe_activations(args)}"] * args.recomputes
    parts += ["inputs of blocks in host memory"] * args.checkpoint_offload
    parts += [f"frozen base in {args.quantize_base}"] * (args.quantize_base != "off")
    parts += [f"{args.block_swap} blocks in host memory"] * (args.block_swap > 0)
    parts += ["T5 on the CPU"] * (args.text_encoder_device == "cpu")
    parts += [f"tensor parallel over {args.model_parallel_size}"] * (args.model_parallel_size > 1)
    return ", ".join(parts)


def describe_activations(args: ArgsConfig) -> str:
    """Returns in words what of the activations is kept for the backward pass."""
    if args.checkpoint_budget is not None:
        return f"kept within {args.checkpoint_budget:g} of their memory, the rest recomputed"
    if args.keeps_what_fits:
        return "kept as the memory of the GPUs allows"
    if not args.recomputes:
        return "kept"
    some = "" if args.checkpoint_every == 1 else f" in one block of {args.checkpoint_every}"
    return f"recomputed ({args.recompute}){some}"


def _validation(config: RunConfig) -> str:
    args = config.args
    if args.eval_interval is None:
        return "none"
    videos = "" if args.valid_video_interval is None else f", videos every {args.valid_video_interval}"
    return f"every {args.eval_interval} steps{videos}"


def _checkpoints(config: RunConfig) -> str:
    args = config.args
    if args.save is None:
        return "none"
    retention = "all kept" if args.keep_last is None else f"last {args.keep_last} kept"
    return f"every {args.save_interval} steps in {args.save}/{args.experiment_name}-*, {retention}"


def _doubts(config: RunConfig, facts: RunFacts) -> Iterator[str]:
    if config.data is not None and not math.isclose(config.data.params.fps, config.spec.trained_fps):
        fps = config.data.params.fps
        yield f"data.params.fps = {fps:g}, but this model was trained at {config.spec.trained_fps}"
    if facts.clips is not None and facts.data_ranks is not None:
        step_size = _samples_a_step(config, facts.data_ranks)
        if step_size > facts.clips.train:
            yield f"one step takes {step_size} samples and there are {_count(facts.clips.train, 'clip')}"

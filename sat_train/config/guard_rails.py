"""Guard rails: settings that waste GPU hours, judged by the numbers that CogVideoX is known to train with.

Each is in the table of `docs/recipes.md`, in the words of its docstring.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from sat_train.config.rule import ParsedConfig, rule
from sat_train.config.values import show_rate
from sat_train.errors import Fault

SAT_FILE = "https://github.com/zai-org/CogVideo/blob/main/sat/configs/sft.yaml"
DIFFUSERS_SETTINGS = "https://github.com/zai-org/CogVideo/blob/main/finetune/schemas/args.py"
DIFFUSERS_GUIDE = "https://github.com/zai-org/CogVideo/blob/main/finetune/README.md"
DIFFUSERS_LORA = "https://github.com/zai-org/CogVideo/blob/main/finetune/models/cogvideox_t2v/lora_trainer.py"
PEFT_SCALE = "https://huggingface.co/docs/peft/package_reference/lora"
EMA_LENGTHS = "https://arxiv.org/abs/2312.02696"
ADAM_SCALING = "https://arxiv.org/abs/2205.10287"

LORA = "model.network_config.params.modules.lora_config.params"

# Adam changes an adapted weight in proportion to lr * alpha / r, the effective rate. Known to work are SAT's
# (lr 5e-4 to 1e-3, alpha 1, rank 128: 3.9e-6 to 7.8e-6) and that of diffusers (2e-5, 64, 128: 1e-5).
_KNOWN_LORA_RATES = (5e-4 / 128, 1e-5)
# No warning between a quarter of the lowest, which is slow, and ten times the highest: 1e-4 is usual with
# alpha = r in other trainers.
_LORA_RATES = (5e-4 / 128 / 4, 1e-4)
_SAT_LORA_RATES, _SAT_SFT_RATE = (5e-4, 1e-3), 1e-5
_HIGHEST_SFT_RATE = 5e-5
_LOWEST_PRODIGY_RATE = 0.1
_FEWEST_STEPS = {"LoRA": 1000, "SFT": 500}
_SHORTEST_TIMEOUT = 30.0  # minutes
_LARGEST_START_SHARE = 0.05  # of the initial weights in the average at the end of a run
_RELEASED = {(30, 1920): "2B", (42, 3072): "5B"}  # layers and width
_SAT_BATCH = 16  # clips: 2 on each of 8 GPUs
_KNOWN_SFT_RATES = (1e-5, 2e-5)
_HIGHEST_TRUNCATED_SHARE = 0.01
_SMALL_CARD = 24.0  # GiB
_ENCODERS_GIB = 10.0  # T5 and autoencoder, see the heads of configs/model/*.yaml
_ROUNDING = 1 + 1e-9
# Rates of other optimizers have other scales.
_ADAM = ("Adam", "AdamW", "AdamW8bit")


def _trains(config: ParsedConfig) -> bool:
    """Returns whether the configuration describes a whole training run: no part of one, and no sampling."""
    has_length = config.args.train_iters is not None or config.args.epochs is not None
    return config.purpose in ("train", "check") and config.args.mode != "inference" and has_length


def _release(config: ParsedConfig) -> str:
    """Returns the size of a released network; nothing for others, such as the embedded one."""
    return _RELEASED.get((config.spec.layers, config.spec.width), "")


@rule("args.warmup", "args.train_iters", source=DIFFUSERS_SETTINGS)
def whole_warmup(config: ParsedConfig) -> Iterator[Fault]:
    """A warm-up as long as the run or longer, or of a number of steps that is not whole."""
    warmup, iters = config.args.warmup, config.args.train_iters
    if warmup >= 1 and not warmup.is_integer():
        yield config.fault("args.warmup", warmup, "a whole number of steps, or a share of all steps below 1")
    elif iters is not None and warmup >= max(iters, 1):
        yield config.fault("args.warmup", warmup, f"fewer steps than args.train_iters = {iters}")


@rule("args.eval_interval", "args.save_interval", source=DIFFUSERS_SETTINGS)
def validation_lines_up_with_saves(config: ParsedConfig) -> Iterator[Fault]:
    """Intervals of validation and checkpoints of which neither is a multiple of the other."""
    every, save = config.args.eval_interval, config.args.save_interval
    if every is not None and every % save and save % every:
        nearest = max(round(every / save), 1) * save
        yield config.fault(
            "args.eval_interval", every, f"a multiple of args.save_interval = {save}, e.g. {nearest}"
        )


@rule("args.eval_interval", "args.save_interval", severity="warning", source=DIFFUSERS_SETTINGS)
def validated_weights_are_saved(config: ParsedConfig) -> Iterator[Fault]:
    """More validations than checkpoints, as in CogVideo's own file: the best weights may not be kept."""
    every, save = config.args.eval_interval, config.args.save_interval
    if _trains(config) and config.args.save and every is not None and every < save and save % every == 0:
        yield config.fault(
            "args.eval_interval",
            every,
            f"a multiple of args.save_interval = {save}, as weights between checkpoints are lost",
        )


@rule("args.lr", "model.network_config", "deepspeed.optimizer", severity="warning", source=SAT_FILE)
def lora_rate_fits_its_scale(config: ParsedConfig) -> Iterator[Fault]:
    """LoRA with Adam at an effective rate, lr x alpha / r, outside 1e-6 to 1e-4."""
    adapter, lr = config.spec.adapter, config.args.lr
    if adapter is None or not _trains(config) or config.deepspeed.optimizer.type not in _ADAM:
        return
    params = adapter.params
    lowest, highest = _LORA_RATES
    # of layers with several scales the most extreme decide
    wrong = [
        scale
        for scale in params.scales(config.spec.linear_layers())
        if not lowest / _ROUNDING <= lr * scale <= highest * _ROUNDING
    ]
    if wrong:
        scale = wrong[-1]
        low, high = (f"{rate / scale:.0e}" for rate in _KNOWN_LORA_RATES)
        effect = "hardly learns" if lr * scale < lowest else "tends to destroy the model"
        divisor = "sqrt(r)" if params.use_rslora else "r"
        yield config.fault(
            "args.lr",
            lr,
            f"{low} to {high} with alpha {params.lora_alpha:g} and rank {params.r}: "
            f"updates are scaled by alpha / {divisor}, and at an effective rate of {lr * scale:.1e} "
            f"a LoRA {effect}",
        )


@rule("args.load_lora", "model.network_config", "facts.adapter_scales", severity="warning", source=PEFT_SCALE)
def loaded_adapters_keep_their_scale(config: ParsedConfig) -> Iterator[Fault]:
    """Adapters of `args.load_lora` trained at another alpha / r than the YAML's; known when a run starts."""
    adapter, found = config.spec.adapter, config.facts.adapter_scales or ()
    own = () if adapter is None else adapter.params.scales(config.spec.linear_layers())
    if adapter is not None and any(min(abs(scale / each - 1) for each in own) > 1e-5 for scale in found):
        yield config.fault(
            f"{LORA}.lora_alpha",
            adapter.params.lora_alpha,
            f"alpha / r = {' or '.join(f'{scale:g}' for scale in found)}, at which the adapters of "
            f"args.load_lora were trained, not {' or '.join(f'{scale:g}' for scale in own)}: B is multiplied "
            "by the ratio, so that they keep their effect, but the learning rate that suited them may not",
        )


@rule("args.lr", "model", "deepspeed.optimizer", severity="warning", source=SAT_FILE)
def sft_rate_is_low(config: ParsedConfig) -> Iterator[Fault]:
    """Full fine-tuning of a released model with Adam at a learning rate above 5e-5."""
    args, is_adam = config.args, config.deepspeed.optimizer.type in _ADAM
    is_finetuned = _is_sft(config) and args.mode == "finetune"
    if is_finetuned and is_adam and args.lr > _HIGHEST_SFT_RATE * _ROUNDING:
        expected = "1e-5 (SAT) or 2e-5 (diffusers): above 5e-5 full fine-tuning forgets what the model knows"
        yield config.fault("args.lr", args.lr, expected)


@rule("deepspeed.optimizer", severity="warning", source=SAT_FILE)
def second_moment_is_recent(config: ParsedConfig) -> Iterator[Fault]:
    """A second beta of 0.999, the optimizer's default, or above."""
    betas: tuple[float, ...] = getattr(config.deepspeed.optimizer.params, "betas", ())
    if _trains(config) and len(betas) > 1 and betas[1] >= 0.999:
        yield config.fault(
            "deepspeed.optimizer.params.betas",
            betas,
            "[0.9, 0.95]: 0.999 averages squared gradients over 1000 steps and reacts late in a short run",
        )


@rule("args.clip_grad", severity="warning", source=SAT_FILE)
def gradients_are_clipped(config: ParsedConfig) -> Iterator[Fault]:
    """Gradients that are not clipped."""
    if _trains(config) and not config.args.clip_grad:
        yield config.fault(
            "args.clip_grad",
            config.args.clip_grad,
            "0.1 with SAT's learning rates, 1.0 with those of diffusers: one odd clip can undo a run",
        )


@rule("args.lr", "deepspeed.optimizer", severity="warning", source=DIFFUSERS_SETTINGS)
def prodigy_rate_is_a_factor(config: ParsedConfig) -> Iterator[Fault]:
    """Prodigy at a learning rate of 0.1 or below."""
    is_prodigy = config.deepspeed.optimizer.type == "Prodigy"
    if _trains(config) and is_prodigy and config.args.lr <= _LOWEST_PRODIGY_RATE:
        expected = "about 1.0: Prodigy multiplies it by its own estimate, and converges extremely slowly"
        yield config.fault("args.lr", config.args.lr, expected)


@rule(
    "args.clip_grad",
    "args.lr",
    "model.network_config",
    "deepspeed.optimizer",
    severity="warning",
    source=SAT_FILE,
)
def sat_rates_clip_at_a_tenth(config: ParsedConfig) -> Iterator[Fault]:
    """SAT's learning rate (1e-5; LoRA of alpha 1: 5e-4 to 1e-3) and Adam, with clipping at 1.0 or above."""
    adapter, lr, limit = config.spec.adapter, config.args.lr, config.args.clip_grad
    lowest, highest = (_SAT_SFT_RATE, _SAT_SFT_RATE) if adapter is None else _SAT_LORA_RATES
    has_sat_scale = adapter is None or (adapter.params.lora_alpha == 1 and not adapter.params.use_rslora)
    if config.deepspeed.optimizer.type not in _ADAM:
        return
    if _trains(config) and limit >= 1 and has_sat_scale and lowest / _ROUNDING <= lr <= highest * _ROUNDING:
        expected = f"0.1, which belongs to SAT's lr = {lr:g}; 1.0 belongs to the 2e-5 of diffusers"
        yield config.fault("args.clip_grad", limit, expected)


@rule("args.train_iters", "model.network_config", severity="warning", source=SAT_FILE)
def steps_are_enough(config: ParsedConfig) -> Iterator[Fault]:
    """Fewer than 1000 steps of LoRA, or 500 of full fine-tuning, on a released model."""
    kind = "SFT" if config.spec.adapter is None else "LoRA"
    iters, fewest = config.args.train_iters, _FEWEST_STEPS[kind]
    if _trains(config) and _release(config) and iters is not None and iters < fewest:
        expected = f"{fewest} or more: {kind} of a CogVideoX has not learned much before"
        yield config.fault("args.train_iters", iters, expected)


@rule("args.valid_video_interval", "args.zero_stage", severity="warning", source=DIFFUSERS_GUIDE)
def zero3_samples_no_videos(config: ParsedConfig) -> Iterator[Fault]:
    """Validation videos under ZeRO-3."""
    videos = config.args.valid_video_interval
    if _trains(config) and videos is not None and config.args.zero_stage == 3:
        yield config.fault(
            "args.valid_video_interval",
            videos,
            "null with args.zero_stage = 3, which gathers all weights again at every denoising step; "
            "`sat-train sample` samples from the checkpoints",
        )


@rule("args.fp16", "args.bf16", "model.network_config", severity="warning", source=SAT_FILE)
def precision_is_that_of_the_release(config: ParsedConfig) -> Iterator[Fault]:
    """fp16 for a 5B model, which overflows, or bf16 for the 2B model, which was trained in fp16."""
    args, release = config.args, _release(config)
    if _trains(config) and release == "5B" and args.fp16:
        yield config.fault("args.fp16", True, "args.bf16=true instead: 5B was trained in bf16 and overflows")
    if _trains(config) and release == "2B" and args.bf16:
        yield config.fault("args.bf16", True, "args.fp16=true instead: 2B was trained in fp16")


@rule("args.distributed_timeout_minutes", "data.cache", severity="warning", source=DIFFUSERS_SETTINGS)
def timeout_outlasts_encoding(config: ParsedConfig) -> Iterator[Fault]:
    """A timeout below 30 minutes in `sat-train precompute`, or with `data.cache: fill`."""
    minutes = config.args.distributed_timeout_minutes
    fills = _trains(config) and config.data is not None and config.data.cache == "fill"
    if (fills or config.purpose == "precompute") and minutes < _SHORTEST_TIMEOUT:
        yield config.fault(
            "args.distributed_timeout_minutes",
            minutes,
            "30 or more: ranks wait for each other while clips are encoded, and a timeout ends the run",
        )


@rule("args.ema_decay", "args.train_iters", severity="warning", source=EMA_LENGTHS)
def average_leaves_the_start(config: ParsedConfig) -> Iterator[Fault]:
    """A moving average that still holds more than 5 % of the initial weights when the run ends."""
    decay, iters = config.args.ema_decay, config.args.train_iters
    if _trains(config) and decay is not None and iters is not None and decay**iters > _LARGEST_START_SHARE:
        longest = _LARGEST_START_SHARE ** (1 / iters)
        yield config.fault(
            "args.ema_decay",
            decay,
            f"at most {int(longest * 1e4) / 1e4:g} for {iters} steps: {decay**iters:.0%} of the average "
            "would be the weights that the run has started from",
        )


@rule("args.batch_size", "model", "facts.data_ranks", severity="warning", source=SAT_FILE)
def sft_takes_enough_clips(config: ParsedConfig) -> Iterator[Fault]:
    """Full fine-tuning of a released model with fewer than 16 clips in a step of all GPUs."""
    clips = _clips_of_a_step(config)
    if _is_sft(config) and clips is not None and clips < _SAT_BATCH:
        steps = -(-_SAT_BATCH * config.args.gradient_accumulation_steps // clips)
        expected = (
            f"{_SAT_BATCH} clips or more in a step, which has {clips}, e.g. with "
            f"args.gradient_accumulation_steps = {steps}"
        )
        yield config.fault("args.batch_size", config.args.batch_size, expected)


@rule("args.lr", "model", "facts.data_ranks", severity="warning", source=ADAM_SCALING)
def rate_is_not_scaled_with_the_batch(config: ParsedConfig) -> Iterator[Fault]:
    """A known learning rate of Adam multiplied by the clips of a step, or by 16ths of them."""
    adapter, lr, clips = config.spec.adapter, config.args.lr, _clips_of_a_step(config)
    is_adam = config.deepspeed.optimizer.type in _ADAM
    if not (_trains(config) and _release(config) and is_adam and clips is not None):
        return
    scale = 1.0 if adapter is None else adapter.params.scale(adapter.params.r, adapter.params.lora_alpha)
    known = _KNOWN_SFT_RATES if adapter is None else (*(rate / 128 for rate in _SAT_LORA_RATES), 1e-5)
    usual = (*known, _LORA_RATES[1])
    if any(math.isclose(lr * scale, rate, rel_tol=1e-3) for rate in usual):
        return
    for rate in known:
        factor = lr * scale / rate
        is_scaled = any(math.isclose(factor, clips / per, rel_tol=1e-3) for per in (1, _SAT_BATCH))
        if is_scaled and not 0.5 < factor < 2:
            root = rate / scale * math.sqrt(clips / _SAT_BATCH)
            expected = (
                f"{show_rate(rate / scale)}, or {show_rate(root)} for {clips} clips in a step instead of "
                f"{_SAT_BATCH}: Adam's rate grows with the root of the batch, not with the batch"
            )
            yield config.fault("args.lr", lr, expected)
            return


@rule("args.valid_video_interval", "model", "facts.card_gib", severity="warning", source=DIFFUSERS_GUIDE)
def sft_videos_fit_the_card(config: ParsedConfig) -> Iterator[Fault]:
    """Videos in full fine-tuning of a released model, on a card of 24 GiB or of less than training takes."""
    videos, card = config.args.valid_video_interval, config.facts.card_gib
    if not _is_sft(config) or videos is None or card is None:
        return
    needed = _state_gib(config) + _ENCODERS_GIB
    if card <= max(_SMALL_CARD, needed):
        yield config.fault(
            "args.valid_video_interval",
            videos,
            f"null on a card of {card:.0f} GiB: weights, optimizer and encoders take {needed:.0f} GiB, and "
            "videos more; `sat-train sample` samples from the checkpoints",
        )


@rule("model.conditioner_config", "facts.long_captions", severity="warning", source=DIFFUSERS_LORA)
def captions_fit_the_text_encoder(config: ParsedConfig) -> Iterator[Fault]:
    """More than 1 % of the captions truncated by the text encoder."""
    share, length = config.facts.long_captions, config.spec.text.max_length
    if _trains(config) and share is not None and share > _HIGHEST_TRUNCATED_SHARE:
        yield config.fault(
            "model.conditioner_config.params.emb_models.0.params.max_length",
            length,
            f"captions of at most {length} tokens: {share:.0%} are longer, and the model never sees their "
            "ends; `sat-train data inspect` names them",
        )


def _is_sft(config: ParsedConfig) -> bool:
    """Returns whether all weights of a released model train."""
    is_frozen = config.spec.adapter is not None or "all" in config.model.not_trainable_prefixes
    return _trains(config) and not is_frozen and bool(_release(config))


def _clips_of_a_step(config: ParsedConfig) -> int | None:
    """Returns the clips of an optimizer step over all ranks; None before their number is known."""
    args, ranks = config.args, config.facts.data_ranks
    return None if ranks is None else args.batch_size * args.gradient_accumulation_steps * ranks


def _state_gib(config: ParsedConfig) -> float:
    """Returns the memory of weights, gradients and optimizer on one GPU: the least that training takes.

    Sampling gathers all weights, also those that ZeRO-3 divides.
    """
    args, zero, ranks = config.args, config.deepspeed.zero_optimization, config.facts.data_ranks or 1
    is_half = args.fp16 or args.bf16
    weight = 2 if is_half else 4
    optimizer = 4 * is_half + config.deepspeed.optimizer.params.bytes_per_weight()
    optimizer = 0 if zero.offload_optimizer.device == "cpu" else optimizer
    each = weight + weight / (ranks if args.zero_stage >= 2 else 1)
    each += optimizer / (ranks if args.zero_stage else 1)
    return sum(config.spec.parameters().values()) * each / args.model_parallel_size / 2**30

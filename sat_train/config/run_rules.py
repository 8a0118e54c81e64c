"""Rules on length, precision, parallelism, validation and sampling."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator

from sat_train.config.catalog import suggest_value
from sat_train.config.parts.registry import choices_in, registered_checks
from sat_train.config.rule import ParsedConfig, rule
from sat_train.config.run_warnings import RUN_WARNINGS
from sat_train.config.schema.args import IMAGE_SEPARATOR, ArgsConfig
from sat_train.config.words import COMMAND_LINE
from sat_train.errors import Fault

_SHARE = re.compile(r"\s*(?:\d{1,9}\.?\d{0,9}|\.\d{1,9})\s*", re.ASCII)
_LEAST_SHARE = 1e-6  # of a mixture: the order of samples is laid out in blocks that hold one sample of each
# Settings under `args` with a reader in one of the two only.
SAMPLING_ONLY = frozenset({"ema", "image", "input_file", "input_type", "output_dir", "prompt"})
TRAINING_ONLY = frozenset(
    {
        *("train_iters", "epochs", "batch_size", "gradient_accumulation_steps", "lr", "weight_decay"),
        *("clip_grad", "warmup", "lr_decay_style", "lr_decay_iters", "lr_decay_ratio", "ema_decay"),
        *("lr_decay_power", "lr_decay_cycles", "lr_decay_share"),
        *("zero_stage", "checkpoint_activations", "checkpoint_every", "compile", "experiment_name", "resume"),
        *("checkpoint_budget", "checkpoint_offload", "quantize_base", "block_swap", "async_save"),
        *("save", "save_interval", "keep_last", "keep_every", "log_interval", "tensorboard", "wandb"),
        *("callbacks", "condition_report", "validation_views"),
        *("wandb_project_name", "eval_interval", "eval_iters", "eval_batch_size", "eval_timesteps"),
        *("valid_prompts", "valid_images", "valid_video_interval", "train_data", "train_data_weights"),
        *("clip_ledger", "keep_best", "early_stop_patience", "early_stop_min_delta"),
        *("valid_data", "split", "num_workers", "prefetch_factor"),
    }
)


@rule("args.attention", "args.deterministic")
def attention_is_deterministic(config: ParsedConfig) -> Iterator[Fault]:
    kernel = config.args.attention
    if config.args.deterministic and kernel in ("cudnn", "fa3"):
        yield config.fault("args.attention", kernel, "auto, flash or math with args.deterministic")


@rule("args.fp16", "args.bf16", "deepspeed.fp16", "deepspeed.bf16")
def one_precision(config: ParsedConfig) -> Iterator[Fault]:
    if config.args.fp16 and config.args.bf16:
        yield config.fault(
            "args.fp16", True, f"false, because args.bf16 is true [{config.source_of('args.bf16')}]"
        )


@rule("args.zero_stage", "args.fp16", "args.bf16", "args.model_parallel_size", "deepspeed")
def stage_zero_in_fp32_only(config: ParsedConfig) -> Iterator[Fault]:
    if config.args.zero_stage == 0 and (config.args.fp16 or config.args.bf16):
        yield config.fault(
            "args.zero_stage",
            0,
            "1 (the right 'no ZeRO' in half precision: stage 0 counts Adam's steps wrongly there)",
        )
    elif config.args.zero_stage == 0 and config.args.model_parallel_size > 1:
        yield config.fault("args.zero_stage", 0, "1, 2 or 3 with args.model_parallel_size above 1")


@rule("args.fp16", "args.device", "deepspeed.fp16")
def fp16_on_gpus_only(config: ParsedConfig) -> Iterator[Fault]:
    if config.args.fp16 and config.args.device == "cpu":
        yield config.fault("args.fp16", True, "false on the CPU; args.bf16=true works there")


@rule("deepspeed.zero_optimization.round_robin_gradients")
def gradients_stay_in_order(config: ParsedConfig) -> Iterator[Fault]:
    if config.deepspeed.zero_optimization.round_robin_gradients:
        yield config.fault(
            "deepspeed.zero_optimization.round_robin_gradients",
            True,
            "false: DeepSpeed then mixes up the master weights of parameters, and the average "
            "of the weights (args.ema_decay) is wrong",
        )


@rule("args.zero_stage", "args.compile", "deepspeed.zero_optimization")
def no_compile_with_stage_three(config: ParsedConfig) -> Iterator[Fault]:
    if config.args.zero_stage == 3 and config.args.compile == "blocks":
        yield config.fault(
            "args.compile", "blocks", "auto or off with ZeRO-3, whose hooks break every compiled block"
        )


@rule("deepspeed.data_types", "deepspeed.zero_optimization", "args.zero_stage", "args.fp16", "args.bf16")
def gradients_add_up_in_fp32(config: ParsedConfig) -> Iterator[Fault]:
    zero, is_half = config.deepspeed.zero_optimization, config.args.fp16 or config.args.bf16
    if config.deepspeed.data_types.grad_accum_dtype is None or not is_half:
        return
    path = "deepspeed.data_types.grad_accum_dtype"
    if config.args.zero_stage == 1:
        yield config.fault(path, "fp32", "null, or args.zero_stage 2 or 3: DeepSpeed wraps stage 1 otherwise")
    if zero.offload_optimizer.device == "cpu":
        expected = "null with offload_optimizer, whose gradients DeepSpeed adds up in half precision"
        yield config.fault(path, "fp32", expected)


@rule("deepspeed.communication_data_type", "args.fp16", "args.bf16")
def gradients_travel_whole(config: ParsedConfig) -> Iterator[Fault]:
    dtype, args = config.deepspeed.communication_data_type, config.args
    if dtype == "fp16" and not args.fp16:
        expected = "null, fp32 or bf16: without a loss scale gradients leave the range of float16"
        yield config.fault("deepspeed.communication_data_type", dtype, expected)
    elif dtype == "bf16" and args.fp16:
        yield config.fault("deepspeed.communication_data_type", dtype, "null, fp32 or fp16 with args.fp16")


@rule("deepspeed.zero_optimization", "args.zero_stage")
def offload_needs_a_stage(config: ParsedConfig) -> Iterator[Fault]:
    zero = config.deepspeed.zero_optimization
    if zero.offload_param.device != "none" and zero.stage != 3:
        path = "deepspeed.zero_optimization.offload_param.device"
        yield config.fault(
            path, zero.offload_param.device, f"none at ZeRO stage {zero.stage}; weights move at stage 3 only"
        )
    if zero.offload_optimizer.device != "none" and zero.stage == 0:
        path = "deepspeed.zero_optimization.offload_optimizer.device"
        yield config.fault(path, zero.offload_optimizer.device, "none at ZeRO stage 0")


@rule("deepspeed.optimizer", "args.zero_stage", "args.model_parallel_size")
def whole_weights_stay_whole(config: ParsedConfig) -> Iterator[Fault]:
    name, args = config.deepspeed.optimizer.type, config.args
    if config.deepspeed.optimizer.params.elementwise:
        return
    reason = f"{name} steps whole weights; deepspeed.optimizer.type=AdamW can step parts of them"
    if args.zero_stage == 3:
        yield config.fault("args.zero_stage", 3, f"1 or 2, as {reason}")
    if args.model_parallel_size > 1:
        yield config.fault("args.model_parallel_size", args.model_parallel_size, f"1, as {reason}")


@rule("deepspeed.optimizer")
def optimizer_is_installed(config: ParsedConfig) -> Iterator[Fault]:
    choice = config.deepspeed.optimizer
    package = choice.params.package
    if config.purpose in ("train", "check") and package and importlib.util.find_spec(package) is None:
        yield config.fault(
            "deepspeed.optimizer.type",
            choice.type,
            f"an optimizer that is installed: {choice.type} needs `pip install {package}`",
        )


@rule("model")
def parts_fit_the_model(config: ParsedConfig) -> Iterator[Fault]:
    sections = {name: getattr(config, name) for name in ("args", "model", "data", "deepspeed")}
    for path, choice in choices_in(sections):
        place = path if choice.base else f"{path}.params"
        for key, expected in choice.settings.check(config.spec):
            yield config.fault(f"{place}.{key}", getattr(choice.settings, key), expected)


@rule("args.distributed_backend", "args.device")
def backend_fits_device(config: ParsedConfig) -> Iterator[Fault]:
    if config.args.device == "cpu" and config.args.distributed_backend == "nccl":
        yield config.fault("args.distributed_backend", "nccl", "auto or gloo, because args.device is cpu")


@rule("args.train_iters", "args.epochs")
def one_length(config: ParsedConfig) -> Iterator[Fault]:
    iters, epochs = config.args.train_iters, config.args.epochs
    if iters is not None and epochs is not None:
        yield config.fault("args.epochs", epochs, f"null, because args.train_iters is {iters}")
    if iters is None and epochs is None and config.purpose == "train":
        yield config.fault("args.train_iters", None, "a number of steps, or args.epochs")


@rule("args.valid_video_interval", "args.eval_interval")
def videos_at_validations(config: ParsedConfig) -> Iterator[Fault]:
    videos, every = config.args.valid_video_interval, config.args.eval_interval
    if videos is not None and (every is None or videos % every):
        yield config.fault(
            "args.valid_video_interval", videos, f"a multiple of args.eval_interval = {every or 'null'}"
        )


@rule("args.early_stop_patience", "args.early_stop_min_delta", "args.eval_interval")
def early_stop_sees_validations(config: ParsedConfig) -> Iterator[Fault]:
    args = config.args
    if args.early_stop_patience is not None and args.eval_interval is None:
        expected = "null, or an args.eval_interval: validations decide"
        yield config.fault("args.early_stop_patience", args.early_stop_patience, expected)
    if args.early_stop_patience is None and args.early_stop_min_delta:
        expected = "0, or an args.early_stop_patience with it"
        yield config.fault("args.early_stop_min_delta", args.early_stop_min_delta, expected)


@rule("args.condition_report", "model.conditions", "model.noised_image_input")
def reported_conditions_exist(config: ParsedConfig) -> Iterator[Fault]:
    known = [*config.model.conditions, "text", *(["image"] if config.model.noised_image_input else [])]
    for number, name in enumerate(config.args.condition_report.conditions or ()):
        if name not in known:
            yield config.fault(
                f"args.condition_report.conditions.{number}",
                name,
                f"a condition of this model: {', '.join(known)}",
                suggest_value(name, known),
            )


@rule("args.split", "args.valid_data", "args.eval_interval")
def shares_of_the_data(config: ParsedConfig) -> Iterator[Fault]:
    if config.args.split is None:
        return
    shares = config.args.split.split(",")
    if len(shares) != 3 or not all(map(_SHARE.fullmatch, shares)):
        yield config.fault(
            "args.split", config.args.split, "three numbers for training, validation, test, e.g. 95,5,0"
        )
    elif (
        config.purpose == "train"
        and config.args.eval_interval
        and not config.args.valid_data
        and not float(shares[1])
    ):
        yield config.fault(
            "args.valid_data", None, "validation data, or a share for it in args.split, or no eval_interval"
        )


@rule("args.train_data", "args.train_data_weights")
def one_weight_a_source(config: ParsedConfig) -> Iterator[Fault]:
    weights, sources = config.args.train_data_weights, config.args.train_data or ()
    if weights is not None and len(weights) != len(sources):
        yield config.fault(
            "args.train_data_weights", weights, f"{len(sources)} weights, one for each of train_data"
        )
    elif weights is not None and not all(0 < weight < math.inf for weight in weights):
        yield config.fault("args.train_data_weights", weights, "weights above 0")
    elif weights and min(weights) < _LEAST_SHARE * sum(weights):
        yield config.fault("args.train_data_weights", weights, "shares of a millionth and more")


@rule("args.mode")
def mode_fits_purpose(config: ParsedConfig) -> Iterator[Fault]:
    if config.purpose == "train" and config.args.mode == "inference":
        yield config.fault("args.mode", "inference", "finetune or pretrain, to train")


@rule("args.mode", "args.load")
def finetune_has_weights(config: ParsedConfig) -> Iterator[Fault]:
    if config.purpose == "precompute":
        return
    if config.args.load is None and (config.args.mode == "finetune" or config.purpose == "sample"):
        remedy = "; args.mode: pretrain starts from random weights" if config.args.mode == "finetune" else ""
        yield config.fault("args.load", None, f"weights to start from{remedy}")


@rule("args.mode", "args.load", "model")
def random_weights_train(config: ParsedConfig) -> Iterator[Fault]:
    """Next to modules a base is frozen unless something says what trains; a random one would stay random."""
    if config.purpose == "train" and config.args.load is None and config.model.freezes_base:
        expected = "what trains, e.g. model.train.all.match=[.]: the base has random weights, and is frozen"
        yield config.fault("model.train", dict(config.model.train), expected)


@rule("args.load_modules", "args.load")
def modules_have_a_base(config: ParsedConfig) -> Iterator[Fault]:
    """Files of module weights hold those next to a base."""
    if config.args.load_modules and config.args.load is None:
        yield config.fault("args.load", None, "the base weights under the modules of args.load_modules")


@rule("args.load_lora", "args.lora_strength", "args.load")
def lora_has_a_base(config: ParsedConfig) -> Iterator[Fault]:
    args = config.args
    files = args.load_lora or ()
    if files and args.load is None:
        yield config.fault("args.load", None, "the base weights of the adapters of args.load_lora")
    if not files and args.lora_strength != (1.0,):
        expected = "1, or args.load_lora with it: it is a factor on the adapters of that file"
        yield config.fault("args.lora_strength", args.lora_strength, expected)
    elif files and len(args.lora_strength) not in (1, len(files)):
        expected = f"one number, or one for each of the {len(files)} files of args.load_lora"
        yield config.fault("args.lora_strength", args.lora_strength, expected)


@rule("data", "args.train_data")
def data_is_given(config: ParsedConfig) -> Iterator[Fault]:
    if config.purpose in ("train", "precompute") and config.data is None:
        yield config.fault(
            "data", "", "a section with params.video_size, params.fps and params.max_num_frames"
        )
    if config.purpose in ("train", "precompute") and not config.args.train_data:
        yield config.fault("args.train_data", None, "at least one folder or manifest")


@rule("data.cache", "data.cache_dir")
def cache_has_a_folder(config: ParsedConfig) -> Iterator[Fault]:
    if config.data is None or config.data.cache_dir is not None:
        return
    if config.purpose == "precompute":
        yield config.fault("data.cache_dir", None, "a folder for the encoded samples")
    elif config.data.cache != "off":
        yield config.fault("data.cache_dir", None, f"a folder, because data.cache is {config.data.cache}")


@rule("args.prompt", "args.input_file", "args.input_type", "args.image", "model")
def there_is_a_prompt(config: ParsedConfig) -> Iterator[Fault]:
    args = config.args
    if config.purpose != "sample":
        return
    if args.input_type == "txt" and args.input_file is None:
        yield config.fault("args.input_file", None, "a text file of prompts, because args.input_type is txt")
    elif args.prompt is None and args.input_file is None:
        yield config.fault("args.prompt", None, "a prompt (--prompt 'a cat'), or args.input_file")
    elif args.prompt is not None and args.image is None and config.spec.takes_first_frames:
        yield config.fault("args.image", None, "a first frame: this model generates videos from images")


@rule("args.valid_prompts", "args.valid_images", "model.noised_image_input")
def validation_images_fit(config: ParsedConfig) -> Iterator[Fault]:
    prompts, images = config.args.valid_prompts, config.args.valid_images
    num_named = sum(IMAGE_SEPARATOR in prompt for prompt in prompts)
    if not config.model.noised_image_input:
        if images:
            yield config.fault("args.valid_images", images, "none: this is a text-to-video model")
        if num_named:
            yield config.fault("args.valid_prompts", prompts, "no images (prompt@@image) for text-to-video")
    elif images and (num_named or len(images) != len(prompts)):
        expected = f"one image for each of the {len(prompts)} args.valid_prompts, named here or there"
        yield config.fault("args.valid_images", images, expected)
    elif num_named not in (0, len(prompts)):
        yield config.fault("args.valid_prompts", prompts, "prompt@@image in all of them, or in none")


@rule("args")
def keys_have_a_reader(config: ParsedConfig) -> Iterator[Fault]:
    """Yields a fault for each explicit setting that nothing reads for this purpose.

    A file may describe both training and sampling, so in sampling only the command line is checked.
    Sampling's own settings are refused in training, where they would look as if they had an effect.
    """
    if config.purpose == "check":
        return
    is_sampling = config.purpose == "sample"
    for name in sorted(TRAINING_ONLY if is_sampling else SAMPLING_ONLY):
        path, value = f"args.{name}", getattr(config.args, name)
        is_typed = config.source_of(path) == COMMAND_LINE
        if is_typed if is_sampling else value != ArgsConfig.model_fields[name].default:
            verb = "sampling" if is_sampling else "training"
            instead = "args.save" if name == "output_dir" and not is_sampling else ""
            yield config.fault(path, value, f"no such setting: {verb} does not read it", instead)


# Rules that also depend on the device behind `auto`; the engine checks them again once it is known.
ENGINE_RULES = (stage_zero_in_fp32_only, no_compile_with_stage_three, fp16_on_gpus_only)


@rule("args.silence")
def silenced_rails_exist(config: ParsedConfig) -> Iterator[Fault]:
    rails = [check.name for check in registered_checks() if check.severity == "warning"]
    names = sorted([*rails, *RUN_WARNINGS])
    for index, name in enumerate(config.args.silence):
        if name not in names:
            expected = f"a guard rail or a run's warning: {', '.join(names)}"
            yield config.fault(f"args.silence.{index}", name, expected, suggest_value(name, names))

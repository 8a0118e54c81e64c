"""Names and keys of older files: CogVideo's `sat/` and SwissArmyTransformer. Nothing of them is imported.

Source: zai-org/CogVideo@7a1af71 `sat/configs/*.yaml`, `sat/arguments.py`; THUDM/SwissArmyTransformer@63dc23a
`sat/arguments.py`.
"""

from __future__ import annotations

import fnmatch
from functools import lru_cache
from typing import Any

_DIFFUSION = "sgm.modules.diffusionmodules"
_OLD_DATASET = "data_video.SFTDataset"

TARGETS = {
    "dit_video_concat.DiffusionTransformer": "DiffusionTransformer",
    "dit_video_concat.Basic3DPositionEmbeddingMixin": "Sincos3DPositionEmbedding",
    "dit_video_concat.Rotary3DPositionEmbeddingMixin": "Rotary3DPositionEmbedding",
    "sat.model.finetune.lora2.LoraMixin": "Lora",
    f"{_DIFFUSION}.sampling.VPSDEDPMPP2MSampler": "DPMPP2M",
    f"{_DIFFUSION}.sampling.VideoDDIMSampler": "DDIM",
    f"{_DIFFUSION}.sigma_sampling.DiscreteSampling": "Uniform",
    "DiscreteSampling": "Uniform",
    f"{_DIFFUSION}.guiders.DynamicCFG": "DynamicGuidance",
    f"{_DIFFUSION}.guiders.VanillaCFG": "ConstantGuidance",
}
OPTIMIZERS = {"sat.ops.FusedEmaAdam": "AdamW", "FusedEmaAdam": "AdamW"}

NO_EFFECT = "never had an effect"
# Keys of old files that nothing reads here, by the reason. Patterns as in a shell.
_KEYS_WITHOUT_EFFECT = {
    NO_EFFECT: (
        "args.log_image args.debug args.final_size args.grid_num_rows args.lcm_steps args.input_dir "
        "model.no_cond_log model.input_key model.use_pd model.augmentation_dropout model.lr_scale "
        "model.network_wrapper model.network_config.params.adm_in_channels "
        "model.network_config.params.transformer_args.vocab_size "
        "model.network_config.params.transformer_args.max_sequence_length "
        "model.network_config.params.transformer_args.skip_init "
        "model.first_stage_config.params.*coder_config.params.resolution "
        "model.loss_fn_config.params.fixed_frames model.loss_fn_config.params.block_scale "
        "model.loss_fn_config.params.block_size model.sampler_config.params.fixed_frames"
    ),
    "all randomness comes from the seed and the step": "args.no_load_rng args.no_save_rng",
    "`resume` always continues at the same sample": "args.resume_dataloader",
    "weights that do not fit are an error": "args.force_train args.force_pretrain args.force_inference",
    "use `args.valid_video_interval`": "args.only_log_video_latents",
    "known from the model": "args.latent_channels",
    "known from `model.noised_image_input`": "args.image2video",
    "read from the environment": "args.local_rank",
    "the order of samples needs no blocks": "args.block_size",
    "loaded weights are never initialized first": "args.skip_init",
    "weights are made where they are used": "args.use_gpu_initialization",
    "the autoencoder has its own precision": "model.disable_first_stage_autocast",
    "captions are always written next to sampled videos": "model.log_keys",
    "the data set says what it yields": "model.latent_input",
    "use `lora_config`": "model.lora_train",
    "use `args.compile`": "model.compile_model",
    "results do not depend on it": "model.first_stage_config.params.*coder_config.params.gather_norm",
    "weights of its training loss are never loaded": "model.first_stage_config.params.ignore_keys",
    "timesteps spread over all ranks": "model.loss_fn_config.params.sigma_sampler_config.params.group_num",
    "progress is always shown": "model.sampler_config.params.verbose",
    "belongs under `deepspeed.fp16`": (
        "deepspeed.loss_scale deepspeed.loss_scale_window deepspeed.hysteresis deepspeed.min_loss_scale"
    ),
    "use `args.checkpoint_activations`": "deepspeed.activation_checkpointing",
    "weights are gathered by one collective": "deepspeed.zero_optimization.allgather_bucket_size",
    "fp32 weights are restored with the checkpoint": "deepspeed.zero_optimization.load_from_fp32_weights",
}
WITHOUT_EFFECT = {key: why for why, keys in _KEYS_WITHOUT_EFFECT.items() for key in keys.split()}
# These modules are frozen and outside the transformer anyway; CogVideo's default names them.
_ALWAYS_FROZEN = ("first_stage_model", "conditioner")


@lru_cache(maxsize=1024)
def reason_without_effect(path: str) -> str:
    """Returns why a key of older files has no effect, or an empty text for all other keys."""
    return next((why for pattern, why in WITHOUT_EFFECT.items() if fnmatch.fnmatchcase(path, pattern)), "")


def modernize(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Translates a file of the older kind to today's names.

    Args:
        tree: The plain content of one file or of the command line.

    Returns:
        The translated tree, and the keys left out of it with the reason.
    """
    dropped: dict[str, str] = {}
    translated = _translate(tree, "", dropped)
    _translate_zero(translated, dropped)
    _translate_lora(translated)
    _translate_optimizer(translated, dropped)
    _translate_model(translated)
    _translate_data(tree, translated, dropped)
    return translated, dropped


def _translate(value: Any, path: str, dropped: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_translate(item, f"{path}.{index}", dropped) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    result: dict[str, Any] = {}
    for key, item in value.items():
        inner = f"{path}.{key}" if path else str(key)
        if why := reason_without_effect(inner):
            dropped[inner] = why
        elif key == "target" and isinstance(item, str):
            result[key] = TARGETS.get(item, item)
        else:
            result[key] = _translate(item, inner, dropped)
    return result


def _section(tree: dict[str, Any], *names: str) -> dict[str, Any]:
    """Returns the group at a path of the tree, or a new empty one where there is none."""
    node: Any = tree
    for name in names:
        node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _translate_zero(tree: dict[str, Any], dropped: dict[str, str]) -> None:
    zero = _section(tree, "deepspeed", "zero_optimization")
    if isinstance(zero.get("cpu_offload"), bool) and "offload_optimizer" not in zero:
        if zero.pop("cpu_offload"):
            zero["offload_optimizer"] = {"device": "cpu"}
        else:
            dropped["deepspeed.zero_optimization.cpu_offload"] = "use `offload_optimizer`"


def _translate_lora(tree: dict[str, Any]) -> None:
    lora = _section(tree, "model", "network_config", "params", "modules", "lora_config", "params")
    if "lora_dropout" in lora and "dropout" not in lora:
        lora["dropout"] = lora.pop("lora_dropout")


def _translate_optimizer(tree: dict[str, Any], dropped: dict[str, str]) -> None:
    optimizer = _section(tree, "deepspeed", "optimizer")
    name = optimizer.get("type")
    if isinstance(name, str) and name in OPTIMIZERS:
        optimizer["type"] = OPTIMIZERS[name]
        dropped[f"deepspeed.optimizer.type={name}"] = "AdamW, with `args.ema_decay` for the average"


def _translate_data(old: dict[str, Any], tree: dict[str, Any], dropped: dict[str, str]) -> None:
    """CogVideo's loader repeats the last frame of a clip that is too short."""
    target = _section(old, "data").get("target")
    if target == _OLD_DATASET and "short_clip" not in (params := _section(tree, "data", "params")):
        params["short_clip"] = "pad"
        dropped[f"data.target={target}"] = "VideoDataset, with `data.params.short_clip: pad`"


def _translate_model(tree: dict[str, Any]) -> None:
    model = _section(tree, "model")
    if "en_and_decode_n_samples_a_time" in model:
        vae: Any = model.setdefault("first_stage_config", {})
        vae = vae.setdefault("params", {}) if isinstance(vae, dict) else None
        if isinstance(vae, dict):  # anything else is a fault for `validate`
            vae["clips_at_once"] = model.pop("en_and_decode_n_samples_a_time")
    prefixes = model.get("not_trainable_prefixes")
    if isinstance(prefixes, list):
        model["not_trainable_prefixes"] = [name for name in prefixes if name not in _ALWAYS_FROZEN]

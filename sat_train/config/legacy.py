"""Names and keys of older files: CogVideo's `sat/` and SwissArmyTransformer. Nothing of them is imported.

Source: zai-org/CogVideo@7a1af71 `sat/configs/*.yaml`, `sat/arguments.py`; THUDM/SwissArmyTransformer@63dc23a
`sat/arguments.py`.
"""

from __future__ import annotations

import fnmatch
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
    f"{_DIFFUSION}.guiders.DynamicCFG": "DynamicGuidance",
    f"{_DIFFUSION}.guiders.VanillaCFG": "ConstantGuidance",
}
OPTIMIZERS = {"sat.ops.FusedEmaAdam": "AdamW", "FusedEmaAdam": "AdamW"}

NO_EFFECT = "never had an effect"
_KNOWN = "known from the model"
# Keys of old files that nothing reads here, with the reason. Patterns as in a shell.
WITHOUT_EFFECT = {
    "args.no_load_rng": "all randomness comes from the seed and the step",
    "args.no_save_rng": "all randomness comes from the seed and the step",
    "args.resume_dataloader": "`resume` always continues at the same sample",
    "args.force_train": "weights that do not fit are an error",
    "args.force_pretrain": "weights that do not fit are an error",
    "args.force_inference": "weights that do not fit are an error",
    "args.only_log_video_latents": "use `args.valid_video_interval`",
    "args.log_image": NO_EFFECT,
    "args.debug": NO_EFFECT,
    "args.final_size": NO_EFFECT,
    "args.grid_num_rows": NO_EFFECT,
    "args.lcm_steps": NO_EFFECT,
    "args.input_dir": NO_EFFECT,
    "args.latent_channels": _KNOWN,
    "args.image2video": "known from `model.noised_image_input`",
    "args.local_rank": "read from the environment",
    "args.block_size": "the order of samples needs no blocks",
    "args.skip_init": "loaded weights are never initialized first",
    "args.use_gpu_initialization": "weights are made where they are used",
    "model.disable_first_stage_autocast": "the autoencoder has its own precision",
    "model.no_cond_log": NO_EFFECT,
    "model.log_keys": "captions are always written next to sampled videos",
    "model.input_key": NO_EFFECT,
    "model.latent_input": "the data set says what it yields",
    "model.use_pd": NO_EFFECT,
    "model.augmentation_dropout": NO_EFFECT,
    "model.lr_scale": NO_EFFECT,
    "model.lora_train": "use `lora_config`",
    "model.compile_model": "use `args.compile`",
    "model.network_wrapper": NO_EFFECT,
    "model.network_config.params.adm_in_channels": NO_EFFECT,
    "model.network_config.params.transformer_args.vocab_size": NO_EFFECT,
    "model.network_config.params.transformer_args.max_sequence_length": NO_EFFECT,
    "model.network_config.params.transformer_args.skip_init": NO_EFFECT,
    "model.first_stage_config.params.*coder_config.params.resolution": NO_EFFECT,
    "model.first_stage_config.params.*coder_config.params.gather_norm": "results do not depend on it",
    "model.first_stage_config.params.ignore_keys": "weights of its training loss are never loaded",
    "model.loss_fn_config.params.fixed_frames": NO_EFFECT,
    "model.loss_fn_config.params.block_scale": NO_EFFECT,
    "model.loss_fn_config.params.block_size": NO_EFFECT,
    "model.loss_fn_config.params.sigma_sampler_config.params.group_num": "timesteps spread over all ranks",
    "model.sampler_config.params.fixed_frames": NO_EFFECT,
    "model.sampler_config.params.verbose": "progress is always shown",
    "deepspeed.loss_scale": "belongs under `deepspeed.fp16`",
    "deepspeed.loss_scale_window": "belongs under `deepspeed.fp16`",
    "deepspeed.hysteresis": "belongs under `deepspeed.fp16`",
    "deepspeed.min_loss_scale": "belongs under `deepspeed.fp16`",
    "deepspeed.activation_checkpointing": "use `args.checkpoint_activations`",
    "deepspeed.zero_optimization.load_from_fp32_weights": "fp32 weights are restored with the checkpoint",
}
# These modules are frozen and outside the transformer anyway; CogVideo's default names them.
_ALWAYS_FROZEN = ("first_stage_model", "conditioner")


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

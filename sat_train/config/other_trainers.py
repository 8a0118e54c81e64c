"""Names of settings in other trainers, so that a message can suggest the name here."""

from __future__ import annotations

from collections.abc import Sequence

_LORA = "model.network_config.params.modules.lora_config.params"
_T5 = "model.conditioner_config.params.emb_models.0.params"

# Our keys, each with its names in diffusers' examples, finetrainers, SimpleTuner, Megatron and the like.
_NAMES = {
    "args.batch_size": "global_batch_size micro_batch_size per_device_train_batch_size train_batch_size",
    "args.bf16": "mixed_precision",
    "args.checkpoint_activations": "gradient_checkpointing",
    "args.clip_grad": "gradient_clipping max_grad_norm",
    "args.ema_decay": "use_ema",
    "args.epochs": "num_epochs num_train_epochs",
    "args.eval_interval": "eval_steps validation_epochs validation_steps",
    "args.gradient_accumulation_steps": "grad_accum_steps",
    "args.guidance_scale": "cfg_scale guidance",
    "args.keep_last": "checkpointing_limit checkpoints_total_limit save_total_limit",
    "args.load": "model_name_or_path model_path pretrained_model_name_or_path",
    "args.log_interval": "log_every logging_steps",
    "args.lr": "learning_rate",
    "args.lr_decay_style": "lr_scheduler lr_scheduler_type",
    "args.num_workers": "dataloader_num_workers",
    "args.resume": "resume_from_checkpoint",
    "args.sampling_steps": "num_inference_steps",
    "args.save": "output_path",
    "args.save_interval": "checkpointing_steps save_every save_steps",
    "args.text_encoder_device": "t5_cpu t5xxl_device text_encoder_cpu",
    "args.train_data": "data_root dataset dataset_path instance_data_root train_data_dir video_root",
    "args.train_iters": "max_num_steps max_steps max_train_steps train_steps",
    "args.valid_prompts": "num_validation_videos validation_prompt validation_prompts",
    "args.wandb": "report_to",
    "args.wandb_project_name": "tracker_name wandb_project",
    "args.warmup": "lr_warmup_steps warmup_steps",
    "args.weight_decay": "adam_weight_decay",
    "args.zero_stage": "deepspeed_stage",
    "data.cache": "cache_latents",
    "data.params.max_num_frames": "max_frames num_frames",
    "data.params.video_size": "height resolution width",
    "deepspeed.optimizer.params.betas": "adam_beta1 adam_beta2",
    "deepspeed.optimizer.params.eps": "adam_epsilon",
    "deepspeed.optimizer.type": "optimizer use_8bit_adam",
    "deepspeed.zero_optimization.offload_optimizer.device": "offload",
    f"{_T5}.max_length": "max_sequence_length",
    "model.conditioner_config.params.emb_models.0.ucg_rate": "caption_dropout caption_dropout_p",
    "model.first_stage_config.params.tiling": "enable_tiling",
    f"{_LORA}.dropout": "lora_dropout",
    f"{_LORA}.lora_alpha": "alpha lora_alpha network_alpha",
    f"{_LORA}.r": "lora_rank network_dim rank",
    f"{_LORA}.targets": "target_modules",
    "model.null_condition": "negative_prompt",
}
OUR_KEYS = {name: key for key, names in _NAMES.items() for name in names.split()}
# Our values, each with other words for it: first by key, then for every key that has the value.
_VALUES: dict[str, dict[str, str]] = {
    "args.attention": {
        "auto": "default native pytorch sdpa torch",
        "flash": "fa2 flash2 flash_attention flash_attention_2 flash_attn xformers",
        "fa3": "flash3 flash_attention_3 flash_attn_3",
        "math": "eager naive",
    },
    "args.checkpoint_activations": {
        "full": "1 all block blocks layer uniform",
        "attention": "sac selective",
    },
    "args.compile": {"off": "eager", "blocks": "block inductor regional"},
    "args.lr_decay_style": {
        "constant": "constant_with_warmup none",
        "wsd": "warmup_stable_decay",
    },
    "args.mode": {"pretrain": "train training", "finetune": "full lora sft", "inference": "sample"},
    "args.quantize_base": {"int8": "8 8bit q8", "nf4": "4 4bit fp4 int4 q4 qlora"},
    "args.text_encoder_device": {"auto": "cuda gpu", "cpu": "host ram"},
    "data.cache": {"fill": "on true write yes"},
    "data.params.short_clip": {"skip": "drop filter ignore", "pad": "loop repeat"},
    "data.params.window": {"head": "begin first start", "center": "middle"},
}
_VALUES_OF_ALL_KEYS = {
    "auto": "default on true yes",
    "cuda": "gpu nvidia",
    "off": "disable disabled no none",
}


# Each word that is known at a key, or at `*`: at every key with the value.
OTHER_WORDS = {
    (path, word): ours
    for path, table in {**_VALUES, "*": _VALUES_OF_ALL_KEYS}.items()
    for ours, words in table.items()
    for word in words.split()
}


def our_value(path: str, word: str, choices: Sequence[str]) -> str:
    """Returns the choice that another word for it means, or an empty text.

    Args:
        path: Dotted path of the key, e.g. `args.attention`.
        word: The word, in small letters.
        choices: The values that the key accepts.
    """
    known = (OTHER_WORDS.get((path, word)), OTHER_WORDS.get(("*", word)))
    return next((ours for ours in known if ours in choices), None) or ""


# Modules of diffusers' transformer, and the one of SAT's that holds the same weights.
LORA_TARGETS = {
    "to_q": r"attention\.query_key_value$",
    "to_k": r"attention\.query_key_value$",
    "to_v": r"attention\.query_key_value$",
    "to_out": r"attention\.dense$",
    "to_out.0": r"attention\.dense$",
    "attn1": r"attention\.",
    "ff.net.0.proj": r"mlp\.dense_h_to_4h$",
    "ff.net.2": r"mlp\.dense_4h_to_h$",
    "norm1.linear": r"adaLN_modulations\.\d+\.1$",
    "norm2.linear": r"adaLN_modulations\.\d+\.1$",
}

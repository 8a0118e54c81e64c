"""Names of settings in other trainers, so that a message can suggest the name here."""

from __future__ import annotations

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

"""What is typed: the shortest commands of each kind, with room for what is hostile."""

from __future__ import annotations

_QUIET = ["args.eval_interval=null", "args.valid_video_interval=null", "args.num_workers=0"]
TRAIN = ["train", "--base", "configs/sft.yaml", "args.train_iters=1", "args.save=runs", *_QUIET]
LORA = ["train", "--base", "configs/lora.yaml", "args.train_iters=1", "args.save=runs", *_QUIET]
SAMPLE = [
    *("sample", "--base", "configs/sample.yaml"),
    *("args.sampling_steps=1", "args.sampling_num_frames=1", "args.output_dir=samples"),
]
PRECOMPUTE = [
    *("precompute", "--base", "configs/sft.yaml", "args.train_iters=1", "data.cache_dir=cache"),
    *_QUIET,
]
INSPECT = ["data", "inspect", "--base", "configs/sft.yaml", "--processes", "1"]
PREVIEW = ["data", "preview", "--base", "configs/sft.yaml", "--count", "2"]
VAE = "model.first_stage_config.params.ckpt_path"
T5 = "model.conditioner_config.params.emb_models.0.params.model_dir"

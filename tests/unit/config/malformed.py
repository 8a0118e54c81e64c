"""Broken configurations, each with the one line that must come of it."""

from __future__ import annotations

from dataclasses import dataclass

NETWORK = "model.network_config.params"
TINY_NETWORK = "model: {network_config: {params: {%s}}}"
TINY_POSITION = "model: {network_config: {params: {modules: {pos_embed_config: %s}}}}"
I2V = "model: {noised_image_input: true, network_config: {params: {in_channels: 32}}}\nargs: {%s}"
BUCKETS = "data: {params: {buckets: {%s}}}"
FROZEN = (
    "model: {not_trainable_prefixes: [all], network_config: {params: {modules: {lora_config: "
    "{target: Lora, params: {r: 4}}}}}}\n"
)
TINY_T5 = """
model:
  conditioner_config:
    params:
      emb_models:
        - {target: T5TextEncoder, %s}
"""


@dataclass(frozen=True)
class Case:
    """A broken file (or broken words), the key that is wrong, and what the line must say."""

    name: str
    text: str
    path: str
    says: str
    words: tuple[str, ...] = ()
    purpose: str = "train"


CASES = [
    # misspelt keys at each level
    Case("section", "arg: {lr: 1.0}", "arg", "did you mean 'args'?"),
    Case("argument", "args: {train_iterz: 5}", "args.train_iterz", "did you mean 'train_iters'?"),
    Case("dashes in YAML", "args: {train-iters: 5}", "args.train-iters", "did you mean 'train_iters'?"),
    Case("model key", "model: {scale_facter: 1.0}", "model.scale_facter", "did you mean 'scale_factor'?"),
    Case("slot key", "model: {network_config: {parms: {}}}", "model.network_config.parms", "'params'"),
    Case(
        "network number", TINY_NETWORK % "num_layer: 2", f"{NETWORK}.num_layer", "did you mean 'num_layers'?"
    ),
    Case(
        "mixin slot",
        TINY_NETWORK % "modules: {lora_confg: {}}",
        f"{NETWORK}.modules.lora_confg",
        "'lora_config'",
    ),
    Case(
        "adapter number",
        TINY_NETWORK % "modules: {lora_config: {target: Lora, params: {rank: 4, r: 4}}}",
        f"{NETWORK}.modules.lora_config.params.rank",
        "a key that exists",
    ),
    Case(
        "a frozen base of random weights",
        "args: {mode: pretrain, load: null}\n"
        "model: {conditions: {c: {target: ControlVideo, params: {into: extras}}}, "
        "modules: {m: {target: ControlBranch, params: {condition: c}}}}\n"
        "data: {fields: {control: {kind: video}}}",
        "model.train",
        "the base has random weights, and is frozen",
    ),
    Case(
        "rank of no adapted layer",
        "model: {not_trainable_prefixes: [all], network_config: {params: {modules: {lora_config: "
        "{target: Dora, params: {r: 4, rank_pattern: {mlp: 2}}}}}}}",
        f"{NETWORK}.modules.lora_config.params.rank_pattern",
        "a pattern that finds a linear layer, such as transformer.layers.0.attention.query_key_value",
    ),
    Case(
        "alpha of a pattern that never ends",
        "model: {not_trainable_prefixes: [all], network_config: {params: {modules: {lora_config: "
        "{target: Pissa, params: {r: 4, alpha_pattern: [['(a+)+$', 2]]}}}}}}",
        f"{NETWORK}.modules.lora_config.params.alpha_pattern",
        "a short pattern",
    ),
    Case(
        "strengths of other files",
        "args: {load_lora: [a, b, c], lora_strength: [1, 2]}",
        "args.lora_strength",
        "one number, or one for each of the 3 files of args.load_lora",
    ),
    Case(
        "in a list",
        TINY_T5 % "params: {model_dir: x, max_lenght: 32}",
        "model.conditioner_config.params.emb_models.0.params.max_lenght",
        "did you mean 'max_length'?",
    ),
    Case(
        "data key",
        "data: {params: {frames_per_second: 8}}",
        "data.params.frames_per_second",
        "a key that exists",
    ),
    Case(
        "data beside params",
        "data: {video_size: [64, 96]}",
        "data.video_size",
        "did you mean 'data.params.video",
    ),
    Case(
        "deepspeed key", "deepspeed: {gradient_clip: 1.0}", "deepspeed.gradient_clip", "'gradient_clipping'"
    ),
    Case(
        "zero key", "deepspeed: {zero_optimization: {stag: 2}}", "deepspeed.zero_optimization.stag", "'stage'"
    ),
    Case(
        "optimizer key",
        "deepspeed: {optimizer: {params: {beta: 1}}}",
        "deepspeed.optimizer.params.beta",
        "'betas'",
    ),
    # wrong types and values
    Case("text for a number", "args: {train_iters: many}", "args.train_iters", "a whole number >= 1 or null"),
    Case("number for a boolean", "args: {deterministic: 1}", "args.deterministic", "true or false"),
    Case("text for a boolean", "args: {wandb: 'yes please'}", "args.wandb", "true or false"),
    Case("fraction for a count", "args: {num_workers: 1.5}", "args.num_workers", "a whole number >= 0"),
    Case("below the limit", "args: {log_interval: 0}", "args.log_interval", "a whole number >= 1"),
    Case("above the limit", "args: {lr_decay_ratio: 1.5}", "args.lr_decay_ratio", "a number >= 0 and <= 1"),
    Case("choice", "args: {mode: finetun}", "args.mode", "did you mean 'finetune'?"),
    Case(
        "limits of timesteps",
        "model: {loss_fn_config: {params: {sigma_sampler_config: "
        "{target: TruncatedNormal, params: {low: 0.5, high: 0.4}}}}}",
        "model.loss_fn_config.params.sigma_sampler_config.params.high",
        "above low = 0.5",
    ),
    Case(
        "timesteps out of reach",
        "model: {loss_fn_config: {params: {sigma_sampler_config: "
        "{target: TruncatedNormal, params: {mean: 3, std: 0.1}}}}}",
        "model.loss_fn_config.params.sigma_sampler_config.params.mean",
        "within 6 std of the limits 0 and 1",
    ),
    Case(
        "clean frames that divide a patch",
        "model: {network_config: {params: {patch_size: [2, 2, 2]}}, loss_fn_config: {params: "
        "{sigma_sampler_config: {target: PrefixClean, params: {frames: 1}}}}}",
        "model.loss_fn_config.params.sigma_sampler_config.params.frames",
        "a multiple of 2",
    ),
    Case(
        "loss term",
        "model: {loss_terms: {hole: {target: MaskdError, params: {condition: x}}}}",
        "model.loss_terms.hole.target",
        "did you mean 'MaskedError'?",
    ),
    Case(
        "loss term without a target",
        "model: {loss_terms: {hole: {weight: 2}}}",
        "model.loss_terms.hole.target",
        "a term besides diffusion: MaskedError, Preference",
    ),
    Case(
        "reserved loss term",
        "model: {loss_terms: {diffusion: {target: Preference}}}",
        "model.loss_terms.diffusion.target",
        "Diffusion",
    ),
    Case(
        "negative weight",
        "model: {loss_terms: {diffusion: {weight: -1}}}",
        "model.loss_terms.diffusion.weight",
        "a number >= 0",
    ),
    Case(
        "no weight left",
        "model: {loss_terms: {diffusion: {weight: 0}}}",
        "model.loss_terms.diffusion.weight",
        "a term with a weight above 0",
    ),
    Case(
        "mask of a condition that is not there",
        "model: {loss_terms: {hole: {target: MaskedError, params: {condition: hole}}}}",
        "model.loss_terms.hole.params.condition",
        "model.conditions",
    ),
    Case(
        "preference without adapters",
        "data: {fields: {losers: {kind: pair}}}\n"
        "model: {conditions: {pairs: {target: PreferencePairs}}, loss_terms: {better: {target: Preference}}}",
        "model.network_config.params.modules.lora_config",
        "adapters: the reference of model.loss_terms.better, Preference, is the model without them",
    ),
    Case(
        "pairs that nothing compares",
        "data: {fields: {losers: {kind: pair}}}\nmodel: {conditions: {pairs: {target: PreferencePairs}}}",
        "model.loss_terms",
        "a term that compares pairs, such as Preference",
    ),
    Case(
        "noise law",
        "model: {loss_fn_config: {params: {noise_config: {target: Norml}}}}",
        "model.loss_fn_config.params.noise_config.target",
        "did you mean 'Normal'?",
    ),
    Case("lr style", "args: {lr_decay_style: cosin}", "args.lr_decay_style", "did you mean 'cosine'?"),
    Case(
        "lr style of SAT",
        "args: {lr_decay_style: exponential}",
        "args.lr_decay_style",
        "constant, linear, cosine",
    ),
    Case("list for a section", "model: {network_config: [1]}", "model.network_config", "a section"),
    Case("one side", "data: {params: {video_size: [64]}}", "data.params.video_size", "a list of 2"),
    Case(
        "text as a side",
        "data: {params: {video_size: [64, wide]}}",
        "data.params.video_size.1",
        "a list of 2",
    ),
    Case("three sides", "data: {params: {video_size: [3, 64, 96]}}", "data.params.video_size", "a list of 2"),
    Case("patch of two", TINY_NETWORK % "patch_size: [2, 2]", f"{NETWORK}.patch_size", "a list of 3"),
    Case(
        "betas",
        "deepspeed: {optimizer: {params: {betas: [0.9, 1.0]}}}",
        "deepspeed.optimizer.params.betas",
        "below 1",
    ),
    Case("optimizer", "deepspeed: {optimizer: {type: AdaFactor}}", "deepspeed.optimizer.type", "Adam, AdamW"),
    Case(
        "stage",
        "deepspeed: {zero_optimization: {stage: 4}}",
        "deepspeed.zero_optimization.stage",
        "one of 0, 1, 2, 3",
    ),
    # targets
    Case(
        "unknown target", "model: {sampler_config: {target: DIMM}}", "model.sampler_config.target", "'DDIM'?"
    ),
    Case(
        "import by name",
        "model: {sampler_config: {target: os.system}}",
        "model.sampler_config.target",
        "DPMPP2M",
    ),
    Case("another module", "data: {target: my_project.MyData}", "data.target", "expected VideoDataset"),
    Case(
        "network of sgm",
        "model: {network_config: {target: sgm.unet.UNet}}",
        "model.network_config.target",
        "Diffusion",
    ),
    Case(
        "position target",
        TINY_POSITION % "{target: Rotary}",
        f"{NETWORK}.modules.pos_embed_config.target",
        "Rotary3D",
    ),
    Case(
        "target of another slot",
        "model: {loss_fn_config: {target: DDIM}}",
        "model.loss_fn_config.target",
        "VideoDiff",
    ),
    Case(
        "no text",
        "model: {sampler_config: {target: [DDIM]}}",
        "model.sampler_config.target",
        "one of DDIM, DPMPP2M",
    ),
    # between settings
    Case(
        "50 frames", "data: {params: {max_num_frames: 50}}", "data.params.max_num_frames", "nearest 49 or 53"
    ),
    Case(
        "48 frames",
        "data: {params: {max_num_frames: 48}}",
        "data.params.max_num_frames",
        "48 is not 4k+1, nearest 45 or 49",
    ),
    Case("bucket key", BUCKETS % "size: [[64, 64]]", "data.params.buckets.size", "did you mean 'sizes'?"),
    Case("bucket size", BUCKETS % "sizes: [[64, 64], [64, 70]]", "data.params.buckets.sizes.1", "[64, 64]"),
    Case("bucket height", BUCKETS % "sizes: [[0, 64]]", "data.params.buckets.sizes.0", "[16, 64]"),
    Case("bucket length", BUCKETS % "frames: [9, 10]", "data.params.buckets.frames.1", "nearest 9 or 13"),
    Case("no frames", BUCKETS % "frames: [0]", "data.params.buckets.frames.0", "nearest 1 or 5"),
    Case(
        "long bucket", BUCKETS % "frames: [21]", "data.params.buckets.frames.0", "at most data.params.max_num"
    ),
    Case("aspect", BUCKETS % "aspects: [wide]", "data.params.buckets.aspects.0", "width:height, e.g. 16:9"),
    Case("few tokens", BUCKETS % "max_tokens: 150", "data.params.buckets.max_tokens", "at least 152"),
    Case("width", "data: {params: {video_size: [64, 100]}}", "data.params.video_size", "[64, 96]"),
    Case("kernel", "args: {attention: cudnn, deterministic: true}", "args.attention", "flash or math"),
    Case("nothing recomputed", "args: {checkpoint_every: 2}", "args.checkpoint_every", "is off"),
    Case(
        "a budget that recomputes nothing",
        "args: {checkpoint_budget: 1, checkpoint_activations: full, checkpoint_offload: true}",
        "args.checkpoint_offload",
        "args.checkpoint_budget=1 recomputes nothing",
    ),
    Case(
        "no captions", "data: {captions_at_once: 0}", "data.captions_at_once", "a whole number >= 1 or auto"
    ),
    Case("budget", "args: {checkpoint_budget: 2}", "args.checkpoint_budget", ">= 0 and <= 1"),
    Case(
        "two policies",
        "args: {checkpoint_budget: 0.5, checkpoint_activations: gemm}",
        "args.checkpoint_activations",
        "args.checkpoint_budget chooses a policy for each block",
    ),
    Case(
        "budget of some blocks",
        "args: {checkpoint_budget: 0.5, checkpoint_every: 2}",
        "args.checkpoint_every",
        "1: args.checkpoint_budget chooses",
    ),
    Case("nothing offloaded", "args: {checkpoint_offload: true}", "args.checkpoint_offload", "is off"),
    Case("few bits train", "args: {quantize_base: nf4}", "args.quantize_base", "configs/lora.yaml"),
    Case(
        "no fourth block", FROZEN + "args: {block_swap: 2}", "args.block_swap", "blocks are always on the GPU"
    ),
    Case(
        "swapped and compiled",
        FROZEN + "args: {block_swap: 3, compile: blocks}",
        "args.block_swap",
        "compile=auto",
    ),
    Case(
        "few bits divided",
        FROZEN + "args: {quantize_base: int8, zero_stage: 3}",
        "args.quantize_base",
        "1 and 2 leave them whole",
    ),
    Case("both precisions", "args: {fp16: true, bf16: true}", "args.fp16", "because args.bf16 is true"),
    Case(
        "stage 0 in bf16",
        "args: {bf16: true}\ndeepspeed: {zero_optimization: {stage: 0}}",
        "args.zero_stage",
        "1 (the",
    ),
    Case(
        "compile at stage 3",
        "args: {compile: blocks}\ndeepspeed: {zero_optimization: {stage: 3}}",
        "args.compile",
        "off",
    ),
    Case(
        "fp32 sums at stage 1",
        "args: {bf16: true, zero_stage: 1}\ndeepspeed: {data_types: {grad_accum_dtype: fp32}}",
        "deepspeed.data_types.grad_accum_dtype",
        "args.zero_stage 2 or 3",
    ),
    Case(
        "gradients out of range",
        "args: {bf16: true}\ndeepspeed: {communication_data_type: fp16}",
        "deepspeed.communication_data_type",
        "without a loss scale",
    ),
    Case(
        "weights offloaded",
        "deepspeed: {zero_optimization: {offload_param: {device: cpu}}}",
        "deepspeed.zero_optimization.offload_param.device",
        "stage 3 only",
    ),
    Case(
        "batch sizes",
        "args: {batch_size: 4}\ndeepspeed: {train_micro_batch_size_per_gpu: 3}",
        "args.batch_size",
        "the same as deepspeed.train_micro_batch_size_per_gpu = 3 [",
    ),
    Case(
        "learning rates",
        "args: {lr: 1e-3}\ndeepspeed: {optimizer: {params: {lr: 1e-4}}}",
        "args.lr",
        "deepspeed.optimizer.params.lr = 0.0001 [",
    ),
    Case(
        "clipping",
        "args: {clip_grad: 1.0}\ndeepspeed: {gradient_clipping: 0.1}",
        "args.clip_grad",
        "deepspeed.gradient_clipping = 0.1",
    ),
    Case("two lengths", "args: {epochs: 2}", "args.epochs", "null, because args.train_iters is 1000"),
    Case("no length", "args: {train_iters: null}", "args.train_iters", "a number of steps, or args.epochs"),
    Case(
        "eval and save",
        "args: {eval_interval: 300, valid_video_interval: null}",
        "args.eval_interval",
        "a multiple of args.save_interval = 250",
    ),
    Case(
        "videos", "args: {valid_video_interval: 40}", "args.valid_video_interval", "args.eval_interval = 500"
    ),
    Case("warm-up", "args: {warmup: 2.5}", "args.warmup", "a whole number of steps"),
    Case("all warm-up", "args: {warmup: 1000}", "args.warmup", "fewer steps than args.train_iters = 1000"),
    Case("no weights", "args: {load: null}", "args.load", "mode: pretrain starts from random weights"),
    Case("inference mode", "args: {mode: inference}", "args.mode", "finetune or pretrain"),
    Case("no data", "args: {train_data: null}", "args.train_data", "at least one folder or manifest"),
    Case(
        "no validation data",
        "args: {valid_data: null, split: '1,0,0'}",
        "args.valid_data",
        "a share for it in args.split",
    ),
    Case("split", "args: {split: half}", "args.split", "three numbers"),
    Case(
        "data weights",
        "args: {train_data_weights: [1, 2]}",
        "args.train_data_weights",
        "1 weights, one for each",
    ),
    Case(
        "heads",
        TINY_NETWORK % "num_attention_heads: 3",
        f"{NETWORK}.hidden_size",
        "divisible by num_attention_heads = 3",
    ),
    Case(
        "head width",
        TINY_NETWORK % "num_attention_heads: 16",
        f"{NETWORK}.num_attention_heads",
        "divisible by 16; now 8",
    ),
    Case(
        "told head width",
        TINY_POSITION % "{params: {hidden_size_head: 32}}",
        f"{NETWORK}.modules.pos_embed_config.params.hidden_size_head",
        "64: hidden_size / heads",
    ),
    Case(
        "model parallel",
        "args: {model_parallel_size: 3}",
        "args.model_parallel_size",
        "a divisor of num_attention_heads = 2",
    ),
    Case(
        "text length",
        TINY_POSITION % "{params: {text_length: 226}}",
        "model.conditioner_config.params.emb_models.0.params.max_length",
        "226, as model.network_config",
    ),
    Case(
        "I2V channels", "model: {noised_image_input: true}", f"{NETWORK}.in_channels", "32 for image-to-video"
    ),
    Case(
        "T2V images",
        "args: {valid_prompts: [a], valid_images: [a.png]}",
        "args.valid_images",
        "none: this is a text-to-video model",
    ),
    Case(
        "T2V prompt", "args: {valid_prompts: ['a@@b.png']}", "args.valid_prompts", "no images (prompt@@image)"
    ),
    Case(
        "images without prompts",
        I2V % "valid_prompts: [a, b], valid_images: [a.png]",
        "args.valid_images",
        "one image for each of the 2 args.valid_prompts",
    ),
    Case(
        "an image for some prompts",
        I2V % "valid_prompts: ['a@@a.png', b]",
        "args.valid_prompts",
        "prompt@@image in all of them, or in none",
    ),
    Case("T2V channels", TINY_NETWORK % "in_channels: 32", f"{NETWORK}.in_channels", "16 for text-to-video"),
    Case(
        "autoencoder channels",
        TINY_NETWORK % "out_channels: 4",
        f"{NETWORK}.out_channels",
        "the autoencoder's z_channels",
    ),
    Case(
        "ofs width", TINY_NETWORK % "ofs_embed_dim: 7", f"{NETWORK}.ofs_embed_dim", "128, as time_embed_dim"
    ),
    Case(
        "two schedules",
        "model: {sampler_config: {params: {discretization_config: {params: {shift_scale: 3.0}}}}}",
        "model.sampler_config.params.discretization_config.params.shift_scale",
        "1.0, as model.denoiser_config says",
    ),
    Case(
        "guidance steps",
        "model: {sampler_config: {params: {guider_config: {params: {num_steps: 20}}}}}",
        "model.sampler_config.params.guider_config.params.num_steps",
        "null, or the sampler's 50",
    ),
    Case(
        "adapters unfrozen",
        TINY_NETWORK % "modules: {lora_config: {params: {r: 4}}}",
        "model.not_trainable_prefixes",
        "because lora_config is given",
    ),
    Case(
        "nothing to train",
        "model: {not_trainable_prefixes: [all]}",
        "model.not_trainable_prefixes",
        "nothing is left",
    ),
    Case(
        "decoders apart",
        "model: {first_stage_config: {params: {decoder_config: {params: {z_channels: 4}}}}}",
        "model.first_stage_config.params.decoder_config.params.z_channels",
        "16, as the encoder's",
    ),
    Case(
        "nccl on the CPU",
        "args: {device: cpu, distributed_backend: nccl}",
        "args.distributed_backend",
        "auto or gloo",
    ),
    Case(
        "table at another size",
        TINY_POSITION % "{params: {learnable_pos_embed: true}}" + "\ndata: {params: {video_size: [96, 96]}}",
        "data.params.video_size",
        "size_policy: interpolate",
    ),
    Case(
        "odd latent frames of 1.5",
        TINY_NETWORK % "patch_size: [2, 2, 2]" + "\nargs: {sampling_num_frames: 21}",
        "args.sampling_num_frames",
        "divisible by the patch's 2 frames: 22",
    ),
    Case("no prompt", "args: {mode: inference}", "args.prompt", "or args.input_file", purpose="sample"),
    # references
    Case(
        "environment", "args: {save: '${oc.env:HOME}'}", "args.save", "resolvers such as `oc.env` are refused"
    ),
    Case("reference to nothing", "args: {save: '${args.nowhere}'}", "args.save", "a key with a value"),
    Case("half a reference", "", "args.save", "a key with a value", ("args.save=${",)),
    Case("reference in a circle", "args: {save: '${args.save}'}", "args.save", "a key"),
    # the command line
    Case("unknown flag", "", "--train-itters", "did you mean '--train-iters'?", ("--train-itters", "5")),
    Case("flag without a value", "", "--lr", "a value after it", ("--lr",)),
    Case("stray word", "", "fast", "a word `key.path=value`", ("fast",)),
    Case("unknown word", "", "args.lrr", "did you mean 'lr'?", ("args.lrr=1",)),
    Case("wrong word", "", "args.seed", "a whole number >= 0", ("args.seed=abc",)),
    Case("no notation", "", "data.params.video_size", "YAML's notation", ("data.params.video_size=[1,",)),
]

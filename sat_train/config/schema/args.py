"""Section `args`: SAT's arguments in SAT's spelling, and ours where SAT has none."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from sat_train.config.parts.callback_parts import CallbackConfig
from sat_train.config.parts.record import (
    FileName,
    Floats,
    HeightWidth,
    Numbers,
    PlainName,
    Quantization,
    Recompute,
    RecomputeChoice,
    Record,
    Switch,
    Text,
    Texts,
    ZeroStage,
    false_to_off,
)
from sat_train.config.parts.registry import NameIn
from sat_train.config.parts.sampler_parts import SamplerConfig
from sat_train.config.parts.view_parts import ViewConfig
from sat_train.config.schema.condition_report import ConditionReportConfig

# between prompt and image in one text, as in CogVideo's prompt files
IMAGE_SEPARATOR = "@@"


Attention = Literal["auto", "flash", "cudnn", "fa3", "math"]


class ArgsConfig(Record):
    """Training, checkpoints, validation and sampling of a run."""

    # The run
    experiment_name: FileName = Field(
        "sat_train",
        max_length=100,
        description="Name of the run directory, before the date, and of the tracker run.",
    )
    mode: Literal["pretrain", "finetune", "inference"] = Field(
        "pretrain",
        description="pretrain: from random weights or `load`. finetune: from `load`. inference: no training.",
    )
    seed: int = Field(
        1234, ge=0, description="Key of all randomness: order, windows, timesteps, noise, new weights."
    )
    deterministic: bool = Field(False, description="Use only kernels that give the same bits at every run.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: CUDA when there is a device, else CPU."
    )

    text_encoder_device: Literal["auto", "cpu"] = Field(
        "auto",
        description="Where T5 encodes captions and prompts. auto: where the transformer is. cpu: in host "
        "memory, which takes seconds a caption.",
    )

    # Length, batch and optimization
    train_iters: int | None = Field(
        None, ge=1, description="Optimizer steps of the whole run. Either this or `epochs`."
    )
    epochs: int | None = Field(
        None, ge=1, description="Passes over the training data, instead of `train_iters`."
    )
    batch_size: int = Field(4, ge=1, description="Samples of one rank in one forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes for one optimizer step.")
    lr: float = Field(1e-4, ge=0, description="Highest learning rate; reached at the end of the warm-up.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay.")
    clip_grad: float = Field(0.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    warmup: float = Field(
        0.01,
        ge=0,
        description="Linear warm-up from 0: below 1 a share of all steps, else a number of steps.",
    )
    lr_decay_style: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "wsd"] = (
        Field(
            "linear",
            description="Learning rate after the warm-up. wsd: constant, until it decays in the last steps.",
        )
    )
    lr_decay_iters: int | None = Field(
        None, ge=1, description="Step at which the decay ends; null: the last step of the run."
    )
    lr_decay_ratio: float = Field(
        0.1, ge=0, le=1, description="Lowest learning rate as a share of the highest."
    )
    lr_decay_power: float = Field(
        2.0, gt=0, le=100, description="Exponent of `polynomial`: 1 is linear, above 1 falls early."
    )
    lr_decay_cycles: int = Field(1, ge=1, description="Cosines of `cosine_with_restarts`; 1 is `cosine`.")
    lr_decay_share: float = Field(
        0.1, gt=0, le=1, description="Share of the steps, the last ones, in which `wsd` decays."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep an exponential moving average of the trained weights, e.g. 0.9999.",
    )

    # Precision, memory and parallelism
    fp16: bool = Field(False, description="Compute in float16 with a loss scale.")
    bf16: bool = Field(False, description="Compute in bfloat16.")
    zero_stage: ZeroStage = Field(1, description="DeepSpeed ZeRO stage. 0 works in fp32 only.")
    checkpoint_activations: RecomputeChoice = Field(
        "off",
        description="What the backward pass computes again instead of keeping it. auto: as little as the "
        "memory of the GPUs allows; full (or true): all but the input of each block; attention: all but that "
        "and the output of attention; gemm: all but the outputs of matrix products and attention; off (or "
        "false): nothing.",
    )
    checkpoint_every: int = Field(
        1, ge=1, description="Recompute one block in so many; 2: every second block keeps its activations."
    )
    checkpoint_budget: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Recompute what keeps activations to a share, block by block: 0 is full, 1 is off, 0.5 "
        "keeps half of what off keeps beyond full. null: checkpoint_activations decides.",
    )
    checkpoint_offload: bool = Field(
        False, description="Hold the inputs of recomputed blocks in host memory until the backward pass."
    )
    quantize_base: Quantization = Field(
        "off",
        description="Hold the linear layers of a frozen base in 8 or 4 bits. Checkpoints and exports go with "
        "the weights of `load`, which stay as they are.",
    )
    block_swap: int = Field(
        0,
        ge=0,
        description="Blocks of a frozen base whose weights are held in host memory; two of them at a time "
        "are on the GPU. The numbers stay the same, bit for bit.",
    )
    attention: Attention = Field(
        "auto",
        description="Kernel that attention prefers. auto: cuDNN on Hopper, else flash. fa3 needs "
        "FlashAttention 3; cudnn and fa3 need a GPU, and may differ from run to run.",
    )
    compile: Annotated[Literal["auto", "off", "blocks"], BeforeValidator(false_to_off)] = Field(
        "auto",
        description="blocks: torch.compile on each DiT block, once for each size of a clip. auto: on GPUs, "
        "but not with ZeRO-3 nor where Triton cannot compile; the log says so.",
    )
    model_parallel_size: int = Field(1, ge=1, description="Ranks that share one model (tensor parallelism).")
    distributed_backend: Literal["auto", "nccl", "gloo"] = Field(
        "auto", description="auto: NCCL on CUDA, gloo on CPU."
    )
    distributed_timeout_minutes: float = Field(
        30.0, gt=0, le=1e6, description="A collective that takes longer ends the run."
    )

    # Weights and checkpoints
    load: Text | None = Field(
        None,
        description="Weights to start from: a SAT folder or file, safetensors, or a diffusers folder.",
    )
    load_base: Text | None = Field(
        None,
        description="Where the base weights of the LoRA run in `load` or `resume` lie now, when they have "
        "moved; compared by hash.",
    )
    load_lora: Texts | None = Field(
        None,
        description="LoRA adapters to start from or to sample with, on top of `load`: a file or folder of "
        "ours, of diffusers, PEFT or kohya. Several add up.",
    )
    lora_strength: Numbers = Field(
        (1.0,),
        min_length=1,
        description="Factor on the adapters of `load_lora`: one for each, or one for all; 1 is as trained.",
    )
    load_modules: Texts | None = Field(
        None,
        description="Weights of network modules on top of `load`: files that `convert --to modules` wrote.",
    )
    resume: Text = Field(
        "none",
        description="auto: resume the newest run of this name, or start. must: resume. none. A path.",
    )
    save: Text | None = Field("runs", description="Folder of run directories. null: save nothing.")
    save_interval: int = Field(500, ge=1, description="Steps between checkpoints.")
    async_save: Switch = Field(
        "auto",
        description="Write checkpoints from a copy in host memory while training continues. auto: where the "
        "copies take at most half of the memory that the machine can spare. off: training waits.",
    )
    keep_last: int | None = Field(3, ge=1, description="Newest checkpoints to keep; null keeps all.")
    keep_every: int | None = Field(
        None, ge=1, description="Also keep the checkpoints of steps divisible by this."
    )

    keep_best: bool = Field(
        True, description="Also keep the saved step with the lowest validation loss, which `best` names."
    )

    # Log and validation
    log_interval: int = Field(50, ge=1, description="Steps between log lines.")
    tensorboard: bool = Field(True, description="Write TensorBoard files into the run directory.")
    wandb: bool = Field(False, description="Report to Weights & Biases.")
    wandb_project_name: Text = Field("sat_train", description="Weights & Biases project.")
    clip_ledger: bool = Field(
        True, description="Keep the training loss of each clip, and name the clips that train worst."
    )
    callbacks: dict[PlainName, CallbackConfig] = Field(
        {}, description="Further callbacks, by a name of your own: target and params."
    )
    silence: Texts = Field((), description="Names of guard rails and of warnings that are not shown.")
    eval_interval: int | None = Field(
        None, ge=1, description="Steps between validations; null: no validation."
    )
    eval_iters: int = Field(
        100,
        ge=1,
        description="Batches of one validation, of `eval_batch_size` clips each; the ranks share them.",
    )
    eval_batch_size: int | None = Field(
        None, ge=1, description="Samples of one rank in a validation batch; null: `batch_size`."
    )
    eval_timesteps: int = Field(
        8, ge=1, le=1000, description="Timesteps at which each validation clip is measured, evenly spread."
    )
    condition_report: ConditionReportConfig = Field(
        ConditionReportConfig(), description="Report of validations on what the conditions are worth."
    )
    validation_views: dict[PlainName, ViewConfig] = Field(
        {}, description="Further numbers and pictures of the validation clips, by a name of your own."
    )
    early_stop_patience: int | None = Field(
        None,
        ge=1,
        description="End the run after so many validations in a row without a lower loss; null: never.",
    )
    early_stop_min_delta: float = Field(
        0.0,
        ge=0,
        description="For `early_stop_patience` a loss is lower only by more than this.",
    )
    valid_prompts: Texts = Field(
        (), description="Prompts of the validation videos; none: captions of the validation clips."
    )
    valid_images: Texts = Field(
        (),
        description="First frames for image-to-video, one for each of `valid_prompts`, which may also be "
        "`prompt@@image`; none: first frames and captions of the validation clips.",
    )
    valid_video_interval: int | None = Field(
        None, ge=1, description="Steps between validation videos; null: no videos."
    )

    # Data
    train_data: Texts | None = Field(
        None, description="Training data: folders, manifests, .tar archives, Hugging Face datasets."
    )
    train_data_weights: Floats | None = Field(None, description="One weight for each entry of `train_data`.")
    valid_data: Texts | None = Field(None, description="Validation data, likewise.")
    split: Text | None = Field(
        None,
        description="Shares of `train_data` for training, validation, test, when `valid_data` is not given. "
        "null: 95,5,0 where `eval_interval` is set, else all of it trains.",
    )
    num_workers: int = Field(
        1, ge=0, description="Decoding processes of one rank; 0 decodes in the training process."
    )
    prefetch_factor: int = Field(4, ge=1, description="Batches that each worker prepares ahead.")

    # Sampling
    ema: bool = Field(
        False, description="Sample with the average of the weights that the run of `load` kept (`ema_decay`)."
    )
    prompt: Text | None = Field(None, description="One prompt; wins over `input_file`.")
    input_type: Literal["cli", "txt"] = Field(
        "cli", description="cli: `prompt`. txt: one prompt a line in `input_file`."
    )
    input_file: Text | None = Field(
        None,
        description="Prompts, one a line, or `prompt@@image`; *.jsonl: objects with prompt and fields.",
    )
    image: Text | None = Field(
        None,
        description="First frame for `prompt`; a video, where the model continues given frames.",
    )
    output_dir: Text = Field("samples", description="Folder for sampled videos.")
    sampling_image_size: HeightWidth | None = Field(
        None,
        description="Height and width of samples in pixels; null: `data.params.video_size`, or the image's.",
    )
    sampling_num_frames: int | None = Field(
        None,
        ge=1,
        description="LATENT frames, as in CogVideo: 13 are 49 frames, 22 are 81 in 1.5; null: as trained.",
    )
    sampling_fps: float | None = Field(
        None, gt=0, le=1000, description="Frames per second of the written videos; null: `data.params.fps`."
    )
    sampling_steps: int | None = Field(
        None, ge=1, description="Wins over `model.sampler_config.params.num_steps`."
    )
    sampler: Annotated[str, NameIn(SamplerConfig)] | None = Field(
        None, description="Wins over `model.sampler_config.target`."
    )
    guidance_scale: float | None = Field(None, ge=0, description="Wins over the guider's `scale`.")
    guidance_drops: Texts | None = Field(
        None,
        description="Conditions that the other half of guidance is without, such as [text, control]; null: "
        "the caption, and those of extensions that say so.",
    )

    @property
    def keeps_what_fits(self) -> bool:
        """Returns whether `checkpoint_activations: auto` has to be settled.

        A budget, `checkpoint_every` and `checkpoint_offload` say what is recomputed.
        """
        says = self.checkpoint_budget is not None or self.checkpoint_every > 1 or self.checkpoint_offload
        return self.checkpoint_activations == "auto" and not says

    @property
    def recompute(self) -> Recompute:
        """Returns the policy of blocks that have none of their own; `auto` is `full` until it is settled."""
        return "full" if self.checkpoint_activations == "auto" else self.checkpoint_activations

    @property
    def recomputes(self) -> bool:
        """Returns whether the backward pass computes activations again."""
        if self.checkpoint_budget is not None:
            return self.checkpoint_budget < 1
        return self.recompute != "off"

    def all_callbacks(self) -> tuple[CallbackConfig, ...]:
        """Returns the callbacks that flags enable, then those of `callbacks`, which win over a flag."""
        flags: dict[str, dict[str, str]] = {"LossByTimestep": {}, "MetricsFile": {}}
        if self.tensorboard:
            flags["TensorBoard"] = {}
        if self.wandb:
            flags["WeightsAndBiases"] = {"project": self.wandb_project_name}
        if self.clip_ledger:
            flags["ClipLedger"] = {}
        targets = {each.target for each in self.callbacks.values()}
        by_flags = [CallbackConfig.of(name, params) for name, params in flags.items() if name not in targets]
        return (*by_flags, *self.callbacks.values())

"""Section `deepspeed`: settings of the DeepSpeed engine, in DeepSpeed's spelling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sat_train.config.parts.optimizer_parts import OptimizerConfig
from sat_train.config.parts.record import Record, Whole, ZeroStage


class OffloadConfig(Record):
    """Offload of ZeRO's states to the host."""

    device: Literal["none", "cpu"] = Field("none", description="none keeps it on the device.")
    pin_memory: bool = Field(False, description="Page-locked host memory: faster copies.")


class ZeroConfig(Record):
    """ZeRO: optimizer states (1), gradients (2) and weights (3) divided over the data axis."""

    stage: ZeroStage = Field(1, description="The same setting as `args.zero_stage`.")
    contiguous_gradients: bool = Field(True, description="Copy gradients into one buffer as they come.")
    overlap_comm: bool | Literal["auto"] = Field(
        "auto",
        description="Reduce gradients on a stream of their own while the backward pass continues; one more "
        "bucket of memory below stage 3. auto: where several GPUs share gradients. No effect at stage 0.",
    )
    reduce_scatter: bool = Field(
        True,
        description="Stage 3: a true reduce-scatter. Stages 1 and 2: a rank keeps its part of what "
        "`use_multi_rank_bucket_allreduce` reduces. false: all-reduce, at every stage.",
    )
    use_multi_rank_bucket_allreduce: bool = Field(
        True,
        description="Stages 1 and 2: a bucket is reduced by one all-reduce. false: by one reduction to each "
        "owner, half the traffic; with overlap_comm the host waits for each of them.",
    )
    reduce_bucket_size: Whole = Field(
        250_000_000,
        ge=1,
        description="Elements reduced at once, allocated as a whole; never more than there are weights that "
        "train. No effect at stage 0.",
    )
    round_robin_gradients: bool = Field(
        False, description="Spread the copies of offloaded gradients over ranks."
    )
    offload_optimizer: OffloadConfig = Field(OffloadConfig(), description="Offload of optimizer states.")
    offload_param: OffloadConfig = Field(OffloadConfig(), description="Offload of weights; stage 3 only.")
    stage3_max_live_parameters: Whole = Field(
        1_000_000_000, ge=1, description="Gathered weights at one time; stage 3."
    )
    stage3_max_reuse_distance: Whole = Field(
        1_000_000_000, ge=1, description="Keep gathered weights used again within this."
    )
    stage3_prefetch_bucket_size: Whole = Field(
        50_000_000, ge=0, description="Weights fetched ahead; stage 3."
    )
    stage3_param_persistence_threshold: Whole = Field(
        100_000, ge=0, description="Smaller weights stay whole; stage 3."
    )


class Fp16Config(Record):
    """float16 and its loss scale."""

    enabled: bool = Field(False, description="The same setting as `args.fp16`.")
    loss_scale: float = Field(0.0, ge=0, description="0: dynamic.")
    initial_scale_power: int = Field(16, ge=0, description="The first dynamic loss scale is 2 to this power.")
    loss_scale_window: int = Field(
        400, ge=1, description="Steps without overflow before the scale is doubled."
    )
    hysteresis: int = Field(2, ge=1, description="Overflows before the scale is halved.")
    min_loss_scale: float = Field(1.0, gt=0, description="The scale never falls below this.")


class Bf16Config(Record):
    """bfloat16."""

    enabled: bool = Field(False, description="The same setting as `args.bf16`.")


class DataTypesConfig(Record):
    """Dtypes that differ from that of computation."""

    grad_accum_dtype: Literal["fp32"] | None = Field(
        None,
        description="Dtype in which the gradients of a step's micro-steps are added up; null: that of "
        "computation. fp32 takes 4 bytes a gradient instead of 2, of a rank's share; stages 2 and 3.",
    )


class DeepSpeedConfig(Record):
    """The DeepSpeed engine around the DiT."""

    train_micro_batch_size_per_gpu: int = Field(4, ge=1, description="The same setting as `args.batch_size`.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="The same setting as in `args`.")
    gradient_clipping: float = Field(0.0, ge=0, description="The same setting as `args.clip_grad`.")
    steps_per_print: int = Field(1_000_000_000, ge=1, description="Steps between DeepSpeed's own log lines.")
    wall_clock_breakdown: bool = Field(
        False, description="DeepSpeed's own timers; they synchronise the device."
    )
    zero_allow_untested_optimizer: bool = Field(True, description="Let ZeRO drive any torch optimizer.")
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = Field(
        None,
        description="Dtype in which gradients are summed over ranks; null: that of computation. fp32 doubles "
        "the traffic of half precision, bf16 halves that of fp32.",
    )
    data_types: DataTypesConfig = Field(DataTypesConfig(), description="Dtypes of gradients.")
    zero_optimization: ZeroConfig = Field(ZeroConfig(), description="ZeRO.")
    fp16: Fp16Config = Field(Fp16Config(), description="float16.")
    bf16: Bf16Config = Field(Bf16Config(), description="bfloat16.")
    optimizer: OptimizerConfig = Field(OptimizerConfig.default(), description="The optimizer.")

"""Reduction of gradients over ranks: what DeepSpeed is told, and the buffers that it then holds.

What its keys do, in microsoft/DeepSpeed@v0.19.8 (`runtime/engine.py`, `runtime/zero/stage_1_and_2.py`,
`runtime/zero/stage3.py`):

* Stage 0 reads none of the bucket keys: the engine all-reduces half a billion elements at a time.
* Stages 1 and 2 copy gradients into a bucket that is allocated for each backward pass, two with
  `overlap_comm`, and reduce it when it is full: stage 2 in every micro-step, stage 1 in the last. A reduced
  bucket is copied once more, because slices for the ranks are made contiguous (not with `reduce_scatter:
  false`), and again where `communication_data_type` is another dtype.
* `use_multi_rank_bucket_allreduce: false` at stages 1 and 2 reduces a bucket once for each owner. With
  `overlap_comm`, `allreduce_and_copy` waits for the device before each of them, as the last slices may still
  be copied; DeepSpeed's default and ours, one all-reduce of the bucket, waits on streams only.
* Stage 3 keeps one bucket, in the dtype of communication, and reduce-scatters it.
* `allgather_bucket_size` is read by none, as PyTorch gathers into one tensor.
* fp32 accumulation at stage 1 in bf16 would replace the optimizer's wrapper by `BF16_Optimizer`.
"""

from __future__ import annotations

from typing import Any

from sat_train.config import DeepSpeedConfig
from sat_train.config.schema.deepspeed import ZeroConfig

_STAGE_0_ELEMENTS = 500_000_000
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def reduction_settings(
    section: DeepSpeedConfig, *, trained: int, data_ranks: int, on_gpu: bool
) -> dict[str, Any]:
    """Returns the keys of DeepSpeed's `zero_optimization` that depend on the model and the ranks.

    Args:
        section: The settings.
        trained: Weights of this rank that train.
        data_ranks: Ranks that share gradients.
        on_gpu: The device is a GPU: it has streams, on which a reduction can run during the backward pass.
    """
    zero = section.zero_optimization
    return {
        "reduce_bucket_size": bucket_elements(zero, trained),
        "overlap_comm": overlaps(zero, data_ranks=data_ranks, on_gpu=on_gpu),
    }


def bucket_elements(zero: ZeroConfig, trained: int) -> int:
    """Returns the elements of a bucket, which DeepSpeed allocates whether gradients fill it or not."""
    return max(1, min(zero.reduce_bucket_size, trained))


def overlaps(zero: ZeroConfig, *, data_ranks: int, on_gpu: bool) -> bool:
    """Returns whether gradients are reduced while the backward pass continues."""
    return (data_ranks > 1 and on_gpu) if zero.overlap_comm == "auto" else zero.overlap_comm


def reduces_to_owners(zero: ZeroConfig) -> bool:
    """Returns whether a bucket is reduced to the owners of its gradients, instead of to all ranks."""
    return zero.stage in (1, 2) and zero.reduce_scatter and not zero.use_multi_rank_bucket_allreduce


def reduced_element_bytes(section: DeepSpeedConfig, element: int) -> int:
    """Returns the bytes of a gradient on its way between ranks; `element` are those of computation."""
    return _BYTES.get(section.communication_data_type or "", element)


def bucket_bytes(section: DeepSpeedConfig, *, trained: int, data_ranks: int, element: int) -> float:
    """Returns the bytes of GPU memory that buckets take through a backward pass.

    The copy that a reduction makes is left out where it has the same dtype: by then the backward pass has
    freed activations of as many layers, and few gradients are there of those that are counted with the rest.

    Args:
        section: The settings.
        trained: Weights of a rank that train.
        data_ranks: Ranks that share gradients.
        element: Bytes of a number in the dtype of computation.
    """
    zero = section.zero_optimization
    elements = bucket_elements(zero, trained)
    travelling = reduced_element_bytes(section, element)
    if zero.stage == 0:
        return travelling * min(_STAGE_0_ELEMENTS, trained) * (data_ranks > 1)
    if zero.stage == 3:
        return travelling * elements
    buckets = 2 if overlaps(zero, data_ranks=data_ranks, on_gpu=True) else 1
    converted = travelling * elements if travelling != element else 0
    return element * elements * buckets * zero.contiguous_gradients + converted

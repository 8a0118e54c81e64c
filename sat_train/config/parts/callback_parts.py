"""Slot `callback` (`args.callbacks.NAME`) and the trackers that come with the package.

A builder gets the parameters and a `CallbackContext`, and returns a `Callback`
(`sat_train/training/loop/callback.py`).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from sat_train.config.parts.record import Text
from sat_train.config.parts.registry import Choice, Params, part


class CallbackParams(Params):
    """Base of the settings of callbacks.

    `every_rank`: set it for a callback that calls collectives or changes the computation; else only rank 0
    runs it. `writes_files`: it is left out of a run that saves nothing.
    """

    every_rank: ClassVar[bool] = False
    writes_files: ClassVar[bool] = False


class CallbackConfig(Choice):
    """A callback of the training loop."""

    slot: ClassVar[str] = "callback"

    target: str = Field(description="The callback.")
    params: CallbackParams = Field(description="Its settings.")


@part("callback", "LossByTimestep", build="sat_train.training.callbacks.loss_by_timestep:build")
class LossByTimestepParams(CallbackParams):
    """Adds the training loss in equal parts of the noise schedule to the metrics; every run has it."""

    every_rank: ClassVar[bool] = True

    parts: int = Field(10, ge=1, le=1000, description="Parts of the schedule.")


@part("callback", "MetricsFile", build="sat_train.training.callbacks.metrics_file:build")
class MetricsFileParams(CallbackParams):
    """Appends the metrics of each logged step to `metrics.jsonl`; every run that saves anything has it."""

    writes_files: ClassVar[bool] = True


@part("callback", "TensorBoard", build="sat_train.training.callbacks.tensorboard:build")
class TensorBoardParams(CallbackParams):
    """Writes scalars and contact sheets for TensorBoard; `args.tensorboard` enables it."""

    writes_files: ClassVar[bool] = True


@part("callback", "WeightsAndBiases", build="sat_train.training.callbacks.wandb:build")
class WeightsAndBiasesParams(CallbackParams):
    """Reports to Weights & Biases; `args.wandb` enables it."""

    writes_files: ClassVar[bool] = True

    project: Text = Field("sat_train", description="Weights & Biases project.")


@part("callback", "ClipLedger", build="sat_train.training.callbacks.clip_ledger:build")
class ClipLedgerParams(CallbackParams):
    """Keeps the training loss of each clip in `clip_losses.jsonl`; `args.clip_ledger` enables it."""

    every_rank: ClassVar[bool] = True
    writes_files: ClassVar[bool] = True


@part("callback", "BlockStatistics", build="sat_train.training.callbacks.block_statistics:build")
class BlockStatisticsParams(CallbackParams):
    """Reports gradient norm and update-to-weight ratio of each block."""

    every_rank: ClassVar[bool] = True

    interval: int = Field(100, ge=1, description="Steps between reports; each gathers all gradients once.")

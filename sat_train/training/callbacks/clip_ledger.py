"""The training loss of each clip: a ledger in the run directory, and the clips that train worst."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sat_train.config.parts.callback_parts import ClipLedgerParams
from sat_train.data.batches import LoadedBatch
from sat_train.distributed.collectives import gather_objects
from sat_train.distributed.processes import ProcessMesh
from sat_train.files import write_text
from sat_train.log import get_logger
from sat_train.objective.training_inputs import LossOutput
from sat_train.training.callbacks.step_records import StepRecords, read_records
from sat_train.training.loop.callback import Callback, CallbackContext, Training
from sat_train.training.loop.metrics import Metrics, TrainMetrics

log = get_logger(__name__)

LEDGER = "clip_losses.jsonl"
TABLE = "clip_losses.csv"
_TIMESTEPS_ALIKE = 125  # timesteps of one part of the schedule, in which losses are compared
_LEAST_SAMPLES, _LEAST_RATIO, _MOST_NAMED = 4, 1.5, 3

Row = tuple[int, str, int, float]  # sample index, clip, timestep, loss


class ClipLedger(Callback):
    """Writes the loss of each sample to `clip_losses.jsonl`, and at the end a table by clip.

    Losses stay where they are until the next report, which waits for them anyway, and on their ranks until
    the next checkpoint. All ranks.

    Args:
        mesh: The process mesh.
        run_directory: Folder of the files.
    """

    optional = True

    def __init__(self, mesh: ProcessMesh, run_directory: Path) -> None:
        self._mesh, self._run_directory = mesh, run_directory
        self._records = StepRecords(run_directory / LEDGER)
        self._keys: list[tuple[int, str, int]] = []
        self._losses: list[torch.Tensor] = []  # on the device
        self._rows: list[Row] = []

    def started(self, trainer: Training) -> None:
        """Drops rows after the checkpoint that the run resumes."""
        if self._mesh.rank == 0:
            self._records.resume(trainer.state.step)

    def loss_computed(self, output: LossOutput, batch: LoadedBatch) -> None:
        """Adds the losses of a batch; ranks of the model axis have the same."""
        if self._mesh.model_rank == 0:
            timesteps = output.timesteps_b.tolist()
            self._keys += zip(batch.sample_indices, batch.clip_ids, timesteps, strict=True)
            self._losses.append(output.loss_b)

    def reported(self, metrics: Metrics) -> None:
        """Brings the losses to the host."""
        if isinstance(metrics, TrainMetrics):
            self._fold()

    def before_save(self, trainer: Training) -> None:
        """Writes the rows of all ranks since the last checkpoint."""
        self._fold()
        rows, self._rows = self._rows, []
        gathered = sorted(row for part in gather_objects(self._mesh, rows) for row in part)
        if self._mesh.rank == 0 and gathered:
            self._records.append({"step": trainer.state.step, "samples": gathered})

    def finished(self, trainer: Training) -> None:
        """Writes the table, and names the worst clips."""
        self.before_save(trainer)
        if self._mesh.rank != 0:
            return
        clips = summarize_clips(read_ledger(self._run_directory))
        write_text(self._run_directory / TABLE, render_table(clips))
        if worst := name_worst(clips):
            log.info("highest training losses for their timesteps: %s (%s)", worst, TABLE)

    def _fold(self) -> None:
        if self._keys:
            losses = torch.cat(self._losses).tolist()
            self._rows += [(*key, loss) for key, loss in zip(self._keys, losses, strict=True)]
            self._keys, self._losses = [], []


@dataclass
class ClipSummary:
    """Training losses of one clip.

    Args:
        clip: Its name.
        count: Its samples.
        mean: Mean of their losses.
        last: Loss of the latest.
        ratio: Mean loss, divided by that of all samples at the same parts of the schedule.
    """

    clip: str
    count: int
    mean: float
    last: float
    ratio: float


@dataclass
class _Sums:
    losses: list[float] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    last_index: int = -1
    last: float = math.nan


def read_ledger(run_directory: Path) -> list[Row]:
    """Returns the rows of a run.

    Raises:
        OSError: The file cannot be read.
    """
    records = read_records(run_directory / LEDGER)
    return [tuple(row) for record in records for row in record["samples"]]


def summarize_clips(rows: Iterable[Row]) -> list[ClipSummary]:
    """Summarises the rows by clip, the highest ratio first.

    The loss of a sample depends on its timestep far more than on its clip, so a clip is compared with what
    other samples at its own timesteps had.
    """
    by_clip: dict[str, _Sums] = {}
    by_part: dict[int, list[float]] = {}
    for index, clip, timestep, loss in rows:
        sums, part = by_clip.setdefault(clip, _Sums()), timestep // _TIMESTEPS_ALIKE
        sums.losses.append(loss)
        sums.parts.append(part)
        by_part.setdefault(part, []).append(loss)
        if index > sums.last_index:
            sums.last_index, sums.last = index, loss
    expected = {part: math.fsum(losses) / len(losses) for part, losses in by_part.items()}
    found = []
    for clip, sums in by_clip.items():
        total, alike = math.fsum(sums.losses), math.fsum(expected[part] for part in sums.parts)
        ratio = total / alike if alike else 1.0
        found.append(ClipSummary(clip, len(sums.losses), total / len(sums.losses), sums.last, ratio))
    return sorted(found, key=lambda summary: (-summary.ratio, summary.clip))


def render_table(clips: Sequence[ClipSummary]) -> str:
    """Renders summaries as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["clip", "count", "mean", "last", "ratio"])
    for each in clips:
        numbers = (f"{value:.6g}" for value in (each.mean, each.last, each.ratio))
        writer.writerow([each.clip, each.count, *numbers])
    return text.getvalue()


def name_worst(clips: Sequence[ClipSummary]) -> str:
    """Names the clips that stand out, of those seen often enough to tell; nothing if none does."""
    worst = [clip for clip in clips if clip.count >= _LEAST_SAMPLES and clip.ratio >= _LEAST_RATIO]
    return ", ".join(f"{clip.clip} {clip.ratio:.2f}x" for clip in worst[:_MOST_NAMED])


def build(params: ClipLedgerParams, context: CallbackContext) -> ClipLedger:
    """Builds the callback of a run."""
    return ClipLedger(context.mesh, context.folder())

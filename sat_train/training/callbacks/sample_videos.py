"""Draws the same prompts again and again, so that a person sees what the run does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sat_train.distributed.collectives import gather_objects
from sat_train.distributed.processes import ProcessGrid
from sat_train.log import get_logger
from sat_train.pipeline.video_file import write_contact_sheet, write_mp4
from sat_train.training.callbacks.callback import Callback

if TYPE_CHECKING:
    from sat_train.training.trainer import Trainer

log = get_logger(__name__)

_SHEET_COLUMNS = 8


class SampleVideos(Callback):
    """Writes `samples/<step>/NN.mp4` and `samples/<step>/contact_sheet.png`; the ranks share the prompts.

    Args:
        grid: The process grid.
        engine: DeepSpeed engine, put into evaluation mode meanwhile.
        run_folder: The run's folder.
        prompts: What is drawn.
        draw: Number of a prompt -> uint8 video_tchw on the CPU; its seed does not depend on the rank.
        fps: Of the files.
        interval: Steps between drawings.
    """

    def __init__(
        self,
        grid: ProcessGrid,
        engine: Any,
        run_folder: Path,
        *,
        prompts: Sequence[str],
        draw: Callable[[int], torch.Tensor],
        fps: float,
        interval: int,
    ) -> None:
        self._grid = grid
        self._engine = engine
        self._run_folder = run_folder
        self._prompts = tuple(prompts)
        self._draw = draw
        self._fps = fps
        self._interval = interval

    def step_done(self, trainer: Trainer) -> None:
        """Draws when it is time."""
        if trainer.stopping:
            return
        if trainer.state.step % self._interval == 0 or trainer.complete:
            self._engine.eval()
            try:
                self._write(self._run_folder / "samples" / f"{trainer.state.step:06d}")
            finally:
                self._engine.train()

    def _write(self, folder: Path) -> None:
        previews: dict[int, torch.Tensor] = {}
        for number, counts in shared_numbers(len(self._prompts), self._grid):
            video = self._draw(number)
            if counts and self._grid.model_rank == 0:
                write_mp4(folder / f"{number:02d}.mp4", video, fps=self._fps)
                previews[number] = _preview(video)
        gathered = {n: video for part in gather_objects(self._grid, previews) for n, video in part.items()}
        if self._grid.rank == 0:
            videos = [gathered[number] for number in sorted(gathered)]
            write_contact_sheet(folder / "contact_sheet.png", videos, self._prompts, columns=_SHEET_COLUMNS)
            log.info("samples in %s", folder)


def shared_numbers(count: int, grid: ProcessGrid) -> list[tuple[int, bool]]:
    """Returns which of `count` items this rank takes, and whether each counts.

    Each rank takes as many, since ZeRO-3 and tensor parallelism need all ranks in every forward pass; what is
    too much repeats the last item and does not count.
    """
    rounds = -(-count // grid.data_size)
    numbers = [turn * grid.data_size + grid.data_rank for turn in range(rounds)]
    return [(min(number, count - 1), number < count) for number in numbers]


def _preview(video_tchw: torch.Tensor) -> torch.Tensor:
    """Returns as many frames as the contact sheet shows."""
    frames = len(video_tchw)
    columns = min(_SHEET_COLUMNS, frames)
    return video_tchw[[round(i * (frames - 1) / max(1, columns - 1)) for i in range(columns)]]

"""Validation videos: the same prompts, sampled at intervals, to show the progress of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sat_train.checkpoint.layout import SAMPLES
from sat_train.distributed.collectives import broadcast_object, gather_objects, gather_pixels
from sat_train.distributed.processes import ProcessMesh
from sat_train.engine.engine import TrainEngine
from sat_train.errors import SatTrainError, TrainingError
from sat_train.log import get_logger
from sat_train.sampling.video_file import spread_frames, write_contact_sheet, write_mp4
from sat_train.training.callbacks.videos_to_sample import VideoToSample
from sat_train.training.loop.callback import Callback, Training, cause_of
from sat_train.training.loop.metrics import VideoMetrics

log = get_logger(__name__)

_SHEET = "contact_sheet.png"
_SHEET_COLUMNS = 8


class SampleVideos(Callback):
    """Writes `samples/<step>/NN.mp4` and `samples/<step>/contact_sheet.png`; the ranks share the videos.

    The contact sheet comes last: where it is missing at the step that a run resumes, that run ended before
    it, and the videos are sampled first. The run can be stopped between two videos.

    Args:
        mesh: The process mesh.
        engine: The engine, put into evaluation mode meanwhile.
        run_directory: The run directory.
        videos: The videos.
        generate: Number of a video -> uint8 video_tchw on the CPU; its seed does not depend on the rank.
        fps: Frame rate of the files.
        interval: Steps between samples.
        lockstep: Each forward pass involves all ranks (ZeRO-3, tensor parallelism): a rank that fails alone
            would leave the others waiting, so the run ends.
    """

    optional = True

    def __init__(
        self,
        mesh: ProcessMesh,
        engine: TrainEngine,
        run_directory: Path,
        *,
        videos: Sequence[VideoToSample],
        generate: Callable[[int], torch.Tensor],
        fps: float,
        interval: int,
        lockstep: bool,
    ) -> None:
        self._mesh = mesh
        self._engine = engine
        self._run_directory = run_directory
        self._videos = tuple(videos)
        self._generate = generate
        self._fps = fps
        self._interval = interval
        self._lockstep = lockstep and mesh.world_size > 1

    def started(self, trainer: Training) -> None:
        """Samples the videos that a resumed run has missed."""
        sheet = contact_sheet(self._run_directory, trainer.state.step)
        if trainer.state.step and self._is_due(trainer) and not broadcast_object(self._mesh, sheet.exists()):
            self._sample(trainer)

    def step_done(self, trainer: Training) -> None:
        """Samples the videos when they are due."""
        if self._is_due(trainer):
            self._sample(trainer)

    def _is_due(self, trainer: Training) -> bool:
        return trainer.state.step % self._interval == 0 or trainer.complete

    def _folder(self, step: int) -> Path:
        return contact_sheet(self._run_directory, step).parent

    def _sample(self, trainer: Training) -> None:
        if trainer.stopping:
            return
        self._engine.eval()
        try:
            previews, problem = self._write_videos(trainer)
        finally:
            self._engine.train()
        problems, shares = gather_objects(self._mesh, problem), gather_pixels(self._mesh, previews)
        if self._mesh.rank == 0 and not trainer.stopping:  # no collective comes after this
            self._finish(trainer, problems, shares)

    def _write_videos(self, trainer: Training) -> tuple[dict[int, torch.Tensor], str]:
        """Writes this rank's videos; returns frames of them by number, and the first failure."""
        folder, previews, problem = self._folder(trainer.state.step), {}, ""
        for number, counts in shared_numbers(len(self._videos), self._mesh):
            if trainer.asked_to_stop():
                break
            try:
                video = self._video(number)
                if counts and self._mesh.model_rank == 0:
                    write_mp4(folder / f"{number:02d}.mp4", video, fps=self._fps)
                    previews[number] = spread_frames(video, _SHEET_COLUMNS)
            except TrainingError:
                raise
            except Exception as error:
                problem = problem or f"video {number}: {cause_of(error)}"
        return previews, problem

    def _video(self, number: int) -> torch.Tensor:
        try:
            return self._generate(number)
        except Exception as error:
            if not self._lockstep:
                raise
            raise TrainingError(f"validation video {number}: {cause_of(error)}") from error

    def _finish(
        self, trainer: Training, problems: Sequence[str], shares: Sequence[dict[int, torch.Tensor]]
    ) -> None:
        """Writes the contact sheet and reports the videos. Rank 0 only."""
        for rank, problem in enumerate(problems):
            if problem:
                raise SatTrainError(f"validation videos of step {trainer.state.step}, rank {rank}: {problem}")
        frames = {number: video for previews in shares for number, video in previews.items()}
        folder = self._folder(trainer.state.step)
        rows = [row for number in sorted(frames) for row in self._rows(number, frames[number])]
        captions, videos = zip(*rows, strict=True)
        write_contact_sheet(folder / _SHEET, videos, captions, columns=_SHEET_COLUMNS)
        log.info("samples in %s", folder)
        paths = tuple(folder / f"{number:02d}.mp4" for number in sorted(frames))
        captions = tuple(video.caption for video in self._videos)
        trainer.report(VideoMetrics(trainer.state.step, folder / _SHEET, paths, captions))

    def _rows(self, number: int, frames_tchw: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Returns the rows of the contact sheet for a video: the video, then what it was generated from."""
        video = self._videos[number]
        return [(video.caption, frames_tchw), *video.shown]


def contact_sheet(run_directory: Path, step: int) -> Path:
    """Returns the path of a step's contact sheet, next to its videos."""
    return run_directory / SAMPLES / f"{step:06d}" / _SHEET


def shared_numbers(count: int, mesh: ProcessMesh) -> list[tuple[int, bool]]:
    """Returns this rank's share of `count` items, and whether each counts.

    All ranks have the same number, since ZeRO-3 and tensor parallelism need all ranks in every forward pass;
    surplus items repeat the last one and do not count.
    """
    rounds = -(-count // mesh.data_size)
    numbers = [turn * mesh.data_size + mesh.data_rank for turn in range(rounds)]
    return [(min(number, count - 1), number < count) for number in numbers]

"""TensorBoard files in the run directory.

The events are written here and not by TensorBoard's own writer, whose background thread dies with a traceback
when the disk is full.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

from sat_train.config.parts.callback_parts import TensorBoardParams
from sat_train.files import read_bytes
from sat_train.training.callbacks.appended_file import AppendedFile
from sat_train.training.loop.callback import Callback, CallbackContext, Training
from sat_train.training.loop.metrics import Metrics, VideoMetrics, scalars

_MOST_IMAGE_BYTES = 2**28
_RGB = 3


class TensorBoard(Callback):
    """Writes scalars, and the contact sheets of validation videos, under `<run>/tensorboard`. Rank 0 only.

    Args:
        run_directory: The run directory.
    """

    optional = True

    def __init__(self, run_directory: Path) -> None:
        self._folder = run_directory / "tensorboard"
        # TensorBoard reads the files of a folder in the order of their names
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(self._folder / name)

    def started(self, trainer: Training) -> None:
        """Opens the file; steps after the resumed one are hidden."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._folder.mkdir(parents=True, exist_ok=True)
        first = trainer.state.step + 1
        version = _event(first, file_version="brain.Event:2")
        self._file.append(version + _event(first, session_log=SessionLog(status=SessionLog.START)))

    def reported(self, metrics: Metrics) -> None:
        """Writes the numbers, or the contact sheet."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if isinstance(metrics, VideoMetrics):
            values = [Summary.Value(tag="valid/samples", image=_image(metrics.contact_sheet))]
        else:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(metrics).items()]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file.append(_event(metrics.step, summary=Summary(value=values)))


def _event(step: int, **content: Any) -> bytes:
    """Encodes one event as a record of the file."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
    return record.getvalue()


def _image(path: Path) -> Any:
    """Encodes a PNG in TensorBoard's format."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    png = read_bytes(path, limit=_MOST_IMAGE_BYTES)
    width, height = struct.unpack(">II", png[16:24])  # the header chunk comes first in every PNG
    return Summary.Image(height=height, width=width, colorspace=_RGB, encoded_image_string=png)


def build(params: TensorBoardParams, context: CallbackContext) -> TensorBoard:
    """Builds the callback of a run."""
    return TensorBoard(context.folder())

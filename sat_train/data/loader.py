"""Batches in global order, prepared by worker processes that no clip can stop by crashing or hanging."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sat_train.data.batches import Batches, DataPosition, LoadedBatch, MicroBatch, OrderedBatches
from sat_train.data.clip_pool import prepare_worker
from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.dataset import SampleResult, VideoDataset
from sat_train.data.failure_log import ClipFailure, FailureLog
from sat_train.data.sampler import ClipRef
from sat_train.data.shared_memory import REMEDY, describe_free
from sat_train.errors import DataError, SatTrainError
from sat_train.log import get_logger

log = get_logger(__name__)

_POLL_S = 1  # interval at which the state of the workers is checked while there is no batch
_IDLE = -1
_PID, _SOURCE, _CLIP, _SINCE_MS = range(4)  # columns of the board


class SampleReader(Protocol):
    """Makes samples from clips, in the workers. The data set itself is a reader, which decodes them.

    Attributes:
        decodes: Whether samples may be pixels, which take much shared memory.
    """

    decodes: bool

    def sample(self, index: int, ref: ClipRef) -> Any:
        """Returns the sample of a clip for an index.

        Raises:
            BadClip: It cannot give a sample.
        """

    def collate(self, samples: Sequence[Any]) -> LoadedBatch:
        """Puts samples into a batch."""


@dataclass(frozen=True)
class _Packed:
    """Message of a worker: a batch and the clips that failed, or the error that ends the run."""

    batch: LoadedBatch | None
    failures: tuple[ClipFailure, ...]
    error: SatTrainError | None = None

    def pin_memory(self) -> _Packed:
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


class _Task(Dataset[Any]):
    """The data set in a worker: sends errors as values, and marks the current clip on the board."""

    def __init__(self, dataset: VideoDataset, reader: SampleReader, board_wf: Tensor) -> None:
        self._dataset = dataset
        self._reader = reader
        self._board_wf = board_wf

    def __getitem__(self, index: int) -> SampleResult[Any] | SatTrainError:
        self._dataset.on_attempt = self._mark
        try:
            return self._dataset.read(index, self._reader.sample)
        except SatTrainError as error:
            return error
        finally:
            self._mark(None)

    def _mark(self, ref: ClipRef | None) -> None:
        info = get_worker_info()
        if info is None:
            return
        row = self._board_wf[info.id]
        row[_CLIP] = _IDLE
        row[_PID] = os.getpid()
        row[_SINCE_MS] = _now_ms()
        if ref is not None:
            row[_SOURCE] = ref.source
            row[_CLIP] = ref.clip


class _Indices:
    """The samples of this rank's batches, in the form of PyTorch's batch sampler."""

    def __init__(self, micro_batches: Iterator[MicroBatch]) -> None:
        self._micro_batches = micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch.mine) for batch in self._micro_batches)


def _pack(reader: SampleReader, results: list[SampleResult[Any] | SatTrainError]) -> _Packed:
    whole: list[SampleResult[Any]] = []
    for result in results:
        if isinstance(result, SatTrainError):
            return _Packed(None, (), result)
        whole.append(result)
    failures = tuple(failure for result in whole for failure in result.failures)
    return _Packed(reader.collate([result.sample for result in whole]), failures)


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000  # one clock for all processes of a machine


class VideoLoader(Generic[Batches]):
    """Iterates over the batches of one rank; the position alone decides the next batch.

    Args:
        dataset: Samples by global index.
        batches: Assignment of samples to this rank.
        failures: Counts bad clips.
        reader: Makes samples from clips; None decodes them.
        num_workers: Decoding processes; 0 decodes in this process.
        prefetch_factor: Batches each worker prepares ahead.
        pin_memory: Whether batches are page-locked, for a faster copy to a CUDA device.
        worker_timeout_s: Time after which a clip is abandoned, by force if necessary.
        replaces_lost: Whether a clip that makes a worker die or hang is replaced like any bad clip. Off if
            several ranks must see the same sample: the others would not know of it, so it ends the run.
        fingerprint: Hash of the sources, for the checkpoint.
    """

    def __init__(
        self,
        *,
        dataset: VideoDataset,
        batches: Batches,
        failures: FailureLog,
        reader: SampleReader | None = None,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        pin_memory: bool = False,
        worker_timeout_s: float = 120.0,
        replaces_lost: bool = True,
        fingerprint: str = "",
    ) -> None:
        self.dataset = dataset
        self.reader = reader or dataset
        self.failures = failures
        self.fingerprint = fingerprint
        self._batches = batches
        self._num_workers = num_workers
        self._prefetch_factor = prefetch_factor if num_workers else None
        self._pin_memory = pin_memory
        self._worker_timeout_s = worker_timeout_s
        self._replaces_lost = replaces_lost
        self._position = batches.start
        self._micro_batches = batches.micro_batches(batches.start)
        self._coming: MicroBatch | None = None
        self._iterator: Iterator[_Packed] | None = None
        self._board_wf = torch.full((max(1, num_workers), 4), _IDLE, dtype=torch.int64).share_memory_()
        self._end = weakref.finalize(self, _kill_workers, self._board_wf)

    @property
    def batches(self) -> Batches:
        """The batches of samples that this rank takes."""
        return self._batches

    @property
    def position(self) -> DataPosition:
        """Position of the run before the next micro-step, whatever the workers prepare ahead."""
        return self._position

    @property
    def epoch_length(self) -> int:
        """Samples of one pass over the data."""
        return self.dataset.order.epoch_length

    @property
    def num_samples(self) -> int:
        """Samples of a finite iteration; later indices repeat early ones to fill the last batch."""
        assert self._batches.stop is not None, "the training order has no end"
        return self._batches.stop

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[LoadedBatch]:
        """Restarts a finite loader at its first batch; an endless one continues at its position."""
        if self._batches.stop is not None:
            self.close()
            self._position = self._batches.start
            self._micro_batches = self._batches.micro_batches(self._position)
            self._coming = None
        return self

    def __next__(self) -> LoadedBatch:
        """Returns the next batch.

        Raises:
            DataError: Too many clips are bad, or one ends the run.
        """
        packed = self._next_packed()
        if packed.error is not None:
            self.close()
            raise packed.error
        for failure in packed.failures:
            self.failures.add(failure)
        self.failures.check()
        return self._move(packed)

    def with_batches(self, batches: OrderedBatches) -> OrderedLoader:
        """Returns another loader of the same data set, with workers of its own."""
        return VideoLoader(
            dataset=self.dataset,
            batches=batches,
            failures=self.failures,
            reader=self.reader,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor or 0,
            pin_memory=self._pin_memory,
            worker_timeout_s=self._worker_timeout_s,
            replaces_lost=self._replaces_lost,
            fingerprint=self.fingerprint,
        )

    def upcoming(self) -> tuple[int, ...]:
        """Returns the samples of the next batch, without waiting for it; empty behind the last one."""
        self._coming = self._coming or next(self._micro_batches, None)
        return () if self._coming is None else self._coming.mine

    def close(self) -> None:
        """Ends the workers. The loader can be used again and continues at its position."""
        self._iterator = None  # asks idle workers to leave and waits for them
        _kill_workers(self._board_wf)

    def _move(self, packed: _Packed) -> LoadedBatch:
        micro_batch = self._coming or next(self._micro_batches)
        self._coming = None
        assert packed.batch is not None
        assert packed.batch.sample_indices == micro_batch.mine, (
            "the workers and the loader disagree on the order"
        )
        self._position = micro_batch.after
        return packed.batch.at(micro_batch.step_positions)

    def _next_packed(self) -> _Packed:
        began = time.monotonic()
        while True:
            if self._iterator is None:
                self._iterator = self._start()
            try:
                return next(self._iterator)
            except StopIteration:
                self.close()
                raise
            except RuntimeError as error:
                if "DataLoader" not in str(error):
                    raise
                self._look_after_workers(error, waited_s=time.monotonic() - began)

    def _start(self) -> Iterator[_Packed]:
        self._board_wf.fill_(_IDLE)
        loader = DataLoader(
            _Task(self.dataset, self.reader, self._board_wf),
            batch_sampler=_Indices(self._batches.micro_batches(self._position)),
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch_factor,
            collate_fn=functools.partial(_pack, self.reader),
            pin_memory=self._pin_memory,
            timeout=_POLL_S if self._num_workers else 0,
            worker_init_fn=prepare_worker,
            generator=torch.Generator(),  # else it draws from the global generator, which is the model's
        )
        with _own_sigchld():
            return iter(loader)

    def _look_after_workers(self, error: RuntimeError, *, waited_s: float) -> None:
        """Finds a worker that died or hangs; does nothing while all of them are busy."""
        alive = {child.pid for child in multiprocessing.active_children()}
        if any(worker.exitcode == -signal.SIGBUS for worker in getattr(self._iterator, "_workers", ())):
            self.close()
            raise DataError(
                f"a data worker died of a bus error: shared memory ran out ({describe_free()})",
                expected="room for the batches that the workers of all ranks prepare ahead",
                remedy=REMEDY,
            )
        late_ms = _now_ms() - 1000 * (1.2 * self._worker_timeout_s + 2)
        for row in self._board_wf.tolist():
            if row[_PID] != _IDLE and row[_PID] not in alive:
                self._lose(row, "worker died", "the process that decoded it ended")
                return
            if row[_CLIP] != _IDLE and row[_SINCE_MS] < late_ms:
                os.kill(row[_PID], signal.SIGKILL)
                self._lose(
                    row, "timeout", f"decoding hangs (data.worker_timeout_s = {self._worker_timeout_s:g})"
                )
                return
        if "exited unexpectedly" in str(error) or waited_s > 2 * self._worker_timeout_s + 60:
            self.close()
            raise DataError(
                f"the data workers stopped outside of any clip: {error}",
                remedy="probably out of memory: lower args.num_workers or args.prefetch_factor",
            )

    def _lose(self, row: list[int], cause: str, detail: str) -> None:
        """Drops the clip of a lost worker, and starts new workers at the same position."""
        if row[_CLIP] == _IDLE:
            self.close()
            raise DataError(
                f"data worker {row[_PID]} died outside of any clip",
                remedy="probably out of memory: lower args.num_workers or args.prefetch_factor",
            )
        record = self.dataset.record(ClipRef(row[_SOURCE], row[_CLIP], 0))
        self.close()
        if not self._replaces_lost:
            raise DataError(
                f"{record.clip_id} cannot be used ({cause}: {detail})",
                expected="with args.model_parallel_size > 1, clips that neither crash nor hang the decoder",
                remedy=f"remove {record.path}",
            )
        log.warning("%s: %s; restarting the data workers without it", record.clip_id, detail)
        self.dataset.given_up[record.clip_id] = BadClip(cause, detail)


OrderedLoader = VideoLoader[OrderedBatches]


@contextlib.contextmanager
def _own_sigchld() -> Iterator[None]:
    """Keeps PyTorch from raising in the middle of a training step when a worker dies; `next` notices it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


def _kill_workers(board_wf: Tensor) -> None:
    """Kills the remaining workers. They ignore SIGTERM, which is meant for the training process."""
    alive = {child.pid for child in multiprocessing.active_children()}
    for pid in board_wf[:, _PID].tolist():
        if pid in alive:
            os.kill(pid, signal.SIGKILL)
    board_wf.fill_(_IDLE)

"""Write-behind: a thread copies, checks, hashes and publishes entries while the next ones are encoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from sat_train.distributed.transfer import CopyToHost
from sat_train.encoding.cache.shards import EntryInfo, ShardWriter

_MOST_WAITING = 4  # entries that the thread has not taken, so that device and host memory are bounded


class WriteBehind:
    """Hands entries to a shard writer in a thread, so that encoding waits neither for copies nor for a disk.

    The entries, and the order in which the writer gets them, are those of the calls. An error of the writer
    is raised by a later call.

    Args:
        writer: Belongs to the thread.
    """

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._waiting: deque[Future[None]] = deque()
        self._keys: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Returns whether an entry of this key was added."""
        return key in self._keys

    def add(self, key: str, tensors: Mapping[str, Tensor], info: EntryInfo) -> None:
        """Adds an entry, as `ShardWriter.add`; waits while several are not written yet.

        Raises:
            DataError: An earlier entry could not be written.
        """
        if key in self._keys:
            return
        self._keys.add(key)
        self._wait(_MOST_WAITING - 1)
        self._waiting.append(self._thread.submit(self._write, key, CopyToHost(tensors), info))

    def check_folder(self) -> None:
        """Raises what the writer would raise once there are entries, before any is made.

        Raises:
            DataError: The disk is full or cannot be written.
        """
        self._writer.check_folder()

    def publish(self) -> None:
        """Waits for all entries, and publishes those that are pending.

        Raises:
            DataError: The disk is full or cannot be written.
        """
        self._wait(0)
        self._writer.publish()

    def publish_or_warn(self) -> None:
        """Waits for all entries, and publishes those that are pending, or warns that they are lost.

        Raises:
            DataError: An entry could not be written, by a writer that does not wait for room.
        """
        self._wait(0)
        self._writer.publish_or_warn()

    def _wait(self, most: int) -> None:
        """Waits until so many entries are left, and raises the errors of those that are not."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0].done()):
            self._waiting.popleft().result()

    def _write(self, key: str, copy: CopyToHost, info: EntryInfo) -> None:
        self._writer.add(key, copy.wait(), info)

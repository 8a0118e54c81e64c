"""Commits a save in the background although a rank has failed, when no collective works any more.

Each rank puts the report of its files into the store once they are written. A rank that fails alone asks
rank 0 to commit by itself, and does not end before that is done. Rank 0 may wait in a collective for the
failed one, so a thread answers for it while the save is in flight.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import asdict
from pathlib import Path

from sat_train.checkpoint.publish import RankReport
from sat_train.distributed.collectives import wait_until
from sat_train.distributed.meeting import read_pulse
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import SatTrainError
from sat_train.files import FileRecord
from sat_train.log import get_logger

log = get_logger(__name__)

_LOOK_EVERY_S = 1.0
_LONGEST_S = 300.0  # for all ranks to write: as long as launchers wait after a signal
_SILENT_S = 10.0  # a rank without a heartbeat for so long has been killed
_GONE_S = 60.0  # the same while nothing has failed: giving up too early would lose a save


class SaveInFlight:
    """A save that all ranks are writing.

    Args:
        mesh: The process mesh.
        name: Name of the save, another one for each.
        publish: Commits the files of all ranks, from their reports; called once, on rank 0.
    """

    def __init__(self, mesh: ProcessMesh, name: str, publish: Callable[[Sequence[RankReport]], Path]) -> None:
        self._mesh, self._publish = mesh, publish
        self._is_shared = mesh.world_size > 1
        # a separate connection: the first one may be blocked by a collective that has not started
        self._store = mesh.store.clone() if self._is_shared else mesh.store
        self._ended, self._request = f"save/{name}/ended", f"save/{name}/request"
        self._reports = {rank: f"save/{name}/{rank}" for rank in range(mesh.world_size)}
        self._outcome: futures.Future[Path] = futures.Future()
        self._lock = threading.Lock()
        if self._is_shared and mesh.rank == 0:
            threading.Thread(target=self._answer, name="lone-commit", daemon=True).start()

    def post(self, report: RankReport) -> RankReport:
        """Puts the report of this rank into the store, and returns it."""
        if self._is_shared:
            self._set(self._reports[self._mesh.rank], json.dumps(asdict(report)))
        return report

    def exchange(self, report: RankReport) -> list[RankReport]:
        """Returns the reports of all ranks but the first data rank, which waits for them; else nothing.

        It waits for as long as they live.
        """
        if self._mesh.data_rank or report.failure:
            return []
        others = {rank: key for rank, key in self._reports.items() if rank >= self._mesh.model_size}
        try:
            if silent := self._wait_for(others, silent_s=_GONE_S, longest_s=math.inf):
                return [RankReport(failure=f"the files of rank {rank}") for rank in silent]
            return [_read(self._store.get(key)) for key in others.values()]
        except RuntimeError as error:
            return [RankReport(failure=f"reports, as the store of the run has gone: {error}"[:300])]

    def publish(self, reports: Sequence[RankReport]) -> Path:
        """Commits the files, or returns or raises what came of it when another thread did. Rank 0 only."""
        with self._lock:
            if not self._outcome.done():
                try:
                    self._outcome.set_result(self._publish(reports))
                except Exception as error:
                    self._outcome.set_exception(error)
                if self._is_shared:
                    self._set(self._ended, "")
        return self._outcome.result()

    def finish_alone(self) -> None:
        """Waits until the save is committed or lost, after an error of this rank that the others do not have.

        Bounded: by a failed write, a killed rank, or five minutes.
        """
        try:
            if not self._is_shared or self._store.check([self._ended]):
                return
            log.warning("this rank has failed; the save that is being written is finished first")
            if self._mesh.rank == 0:
                self._commit_alone()
            else:
                self._store.set(self._request, "")
                self._wait_for({0: self._ended})
        except RuntimeError as error:
            log.warning("the save that was being written is lost, the store of the run has gone: %s", error)

    def _answer(self) -> None:
        """Waits for the request of a failed rank for as long as the save is in flight."""
        try:
            while not self._outcome.done():
                if self._store.check([self._request]):
                    return self._commit_alone()
                futures.wait([self._outcome], timeout=_LOOK_EVERY_S)
        except RuntimeError:  # the store has gone, and with it whoever could ask
            pass

    def _commit_alone(self) -> None:
        if silent := self._wait_for(self._reports):
            log.error(
                "the save that was being written is lost: nothing of %s",
                ", ".join(map("rank {}".format, silent)),
            )
            return self._set(self._ended, "")
        try:
            log.info(
                "saved %s", self.publish([_read(self._store.get(key)) for key in self._reports.values()])
            )
        except (SatTrainError, OSError) as error:
            log.error("not saved: %s", error)

    def _wait_for(
        self, keys: Mapping[int, str], *, silent_s: float = _SILENT_S, longest_s: float = _LONGEST_S
    ) -> list[int]:
        """Waits for a key of each rank; returns the ranks that it gave up."""
        end = time.monotonic() + longest_s
        last: dict[int, tuple[bytes, float]] = {}
        given_up: list[int] = []

        def is_over() -> bool:
            missing = [rank for rank, key in keys.items() if not self._store.check([key])]
            now = time.monotonic()
            for rank in missing:
                pulse = read_pulse(self._store, rank)
                if rank not in last or last[rank][0] != pulse:
                    last[rank] = pulse, now
            if now > end or any(now - last[rank][1] > silent_s for rank in missing):
                given_up.extend(missing)
            return not missing or bool(given_up)

        wait_until(is_over)
        return given_up

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:  # matters only if a rank fails
            log.debug("%s is not in the store: %s", key, error)


def _read(text: bytes) -> RankReport:
    content = json.loads(text)
    return RankReport([FileRecord(**each) for each in content["files"]], content["failure"])

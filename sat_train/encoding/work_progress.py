"""Progress of work that all ranks share: share done, rate and remaining time of the whole run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.progress import BarColumn, Progress, TextColumn

from sat_train.config.values import show_duration
from sat_train.distributed.work_queue import WorkQueue
from sat_train.log import console, get_logger

log = get_logger(__name__)

T = TypeVar("T")

_FIRST_LINE_S, _LINES_S, _BAR_S = 10, 60, 0.5
_BAR_COLUMNS = 16
_SLOW = 0.1  # share of the time from which waiting for data is reported


class WorkProgress:
    """Shows progress as a bar on a terminal, and as a log line a minute elsewhere.

    The rate counts the work of all ranks since the start; work that an earlier run has done is not in the
    queues.

    Args:
        unit: Plural name of the items.
        queues: The work.
        is_shown: Off on all ranks but one.
    """

    def __init__(self, unit: str, queues: Sequence[WorkQueue], *, is_shown: bool) -> None:
        self._unit, self._queues = unit, queues
        self._total = sum(map(len, queues))
        self._is_shown = is_shown and self._total > 0
        self._bar: Progress | None = None
        self._began = self._shown_at = time.monotonic()
        self._waited_s = 0.0

    def __enter__(self) -> WorkProgress:
        self._began = self._shown_at = time.monotonic()
        if self._is_shown and sys.stderr.isatty():
            columns = (BarColumn(bar_width=_BAR_COLUMNS), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console(), transient=True)
            self._task = self._bar.add_task(self.describe(0), total=self._total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        passed_s = time.monotonic() - self._began
        if self._is_shown and passed_s > _FIRST_LINE_S and self._waited_s > _SLOW * passed_s:
            log.info(
                "%s: this rank spent %.0f %% of the time waiting for them; more args.num_workers may help",
                *(self._unit, 100 * self._waited_s / passed_s),
            )

    def awaited(self, items: Iterable[T]) -> Iterator[T]:
        """Yields items, and counts the time until each of them is there."""
        iterator = iter(items)
        while True:
            began = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited_s += time.monotonic() - began
            yield item

    def update(self) -> None:
        """Shows the present state, if the last one is old enough."""
        now = time.monotonic()
        lines_s = _LINES_S if self._shown_at > self._began else _FIRST_LINE_S
        if not self._is_shown or now - self._shown_at < (lines_s if self._bar is None else _BAR_S):
            return
        self._shown_at = now
        done = sum(queue.num_finished() for queue in self._queues)
        if self._bar is None:
            log.info("%s", self.describe(done))
        else:
            self._bar.update(self._task, completed=done, description=self.describe(done))

    def describe(self, done: int) -> str:
        """Returns the state as text.

        Args:
            done: Items that all ranks have done.
        """
        share = f"{self._unit}: {done:,} of {self._total:,}"
        if not done:
            return share
        rate = done / max(time.monotonic() - self._began, 1e-9)
        left = show_duration((self._total - done) / rate)
        return f"{share} ({done / self._total:.0%}), {rate:.3g} {self._unit}/s, eta {left}"

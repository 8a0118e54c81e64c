"""One rank's failure ends all ranks, and the first error is the last thing on the screen.

The first rank that fails leaves its message in the store that all ranks share. A rank that fails afterwards,
most likely because the first one has left a collective, shows that message instead of its own. A thread on
each rank looks for it too: a rank that waits on the device in a collective would not notice for minutes.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

_KEY = "sat_train/first_failure"
_LOOK_EVERY_S = 2.0
# A rank that has failed by itself meanwhile gets this long to say so before it is ended.
_GRACE_S = 3.0


class FailureBoard:
    """Where ranks tell each other that one of them has failed.

    Args:
        store: Shared by all ranks.
        rank: Global rank of this process.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store = store.clone()  # a connection of its own: the other one may wait for minutes
        self._rank = rank
        self._done = threading.Event()

    def watch(self) -> None:
        """Starts a thread that ends this process when another rank has failed."""
        threading.Thread(target=self._look, name="failure-watch", daemon=True).start()

    def close(self) -> None:
        """Stops looking: this rank has ended its work."""
        self._done.set()

    def first(self, message: str) -> str:
        """Reports a failure of this rank, and returns that of the first rank that failed."""
        self._done.set()
        try:
            mine = f"rank {self._rank}: {message}"
            return self._store.compare_set(_KEY, "", mine).decode()
        except (RuntimeError, dist.DistError):  # the store has gone with its rank
            return message

    def _look(self) -> None:
        while not self._done.wait(_LOOK_EVERY_S):
            try:
                failed = self._store.check([_KEY])
            except (RuntimeError, dist.DistError):
                return
            if failed and not self._done.wait(_GRACE_S):
                self._store.set_timeout(timedelta(seconds=5))
                print(self._store.get(_KEY).decode(), file=sys.stderr, flush=True)
                os._exit(1)


def report_to_torchrun(message: str) -> None:
    """Makes torchrun's own summary, which comes after everything else, end with this message.

    Source: pytorch/pytorch `torch/distributed/elastic/multiprocessing/errors/__init__.py` `ProcessFailure`.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        Path(path).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))

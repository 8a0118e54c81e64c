"""Python's garbage collector during training."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY = 10  # steps; what exists since the start takes a millisecond


@contextmanager
def collector_off() -> Iterator[None]:
    """Keeps the garbage collector from running by itself; what exists already is never inspected again.

    It would inspect every object of every library, in the middle of a step and on each rank at another time,
    while the others wait in a collective.
    """
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def collect_between_steps(step: int) -> None:
    """Collects garbage after some steps, on all ranks after the same ones."""
    if step % _EVERY == 0:
        gc.collect()

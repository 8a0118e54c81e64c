"""Python's garbage collector, kept out of imports and training steps.

A collection inspects every object of every library: a quarter of a second with torch and DeepSpeed loaded.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY = 10  # steps; the objects of a run of CogVideoX-5B take ten milliseconds


@contextmanager
def collector_off() -> Iterator[None]:
    """Keeps the garbage collector from running by itself."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def collector_off_in_imports() -> Iterator[None]:
    """Keeps the garbage collector from running; what exists afterwards is never inspected again.

    Libraries are a million objects, and none of them is garbage.
    """
    with collector_off():
        yield
    gc.freeze()


@contextmanager
def collector_off_in_steps() -> Iterator[None]:
    """Keeps the garbage collector from running by itself.

    It would run in the middle of a step, and on each rank at another time, while the others wait in a
    collective. What exists already is frozen meanwhile, unless imports are: they would be thawed with it.
    """
    gc.collect()
    imports_are_frozen = gc.get_freeze_count() > 0
    if not imports_are_frozen:
        gc.freeze()
    try:
        with collector_off():
            yield
    finally:
        if not imports_are_frozen:
            gc.unfreeze()


def collect_between_steps(step: int) -> None:
    """Collects garbage after some steps, on all ranks after the same ones."""
    if step % _EVERY == 0:
        gc.collect()

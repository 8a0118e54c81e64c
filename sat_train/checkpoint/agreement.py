"""Rank 0 works, all ranks learn how it went: all continue, or all raise the same error.

A rank that raises alone leaves the others waiting in their next collective until the process group times out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sat_train.distributed.collectives import broadcast_object
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError, SatTrainError

T = TypeVar("T")


def on_rank_0(mesh: ProcessMesh, function: Callable[[], T]) -> T:
    """Runs `function` on rank 0 and gives all ranks its result or its error.

    Raises:
        SatTrainError: `function` raised one on rank 0; a CheckpointError where that was an OSError.

    Ranks: all.
    """
    outcome: tuple[T | None, SatTrainError | None] | None = None
    if mesh.rank == 0:
        try:
            outcome = (function(), None)
        except SatTrainError as error:
            outcome = (None, error)
        except OSError as error:
            outcome = (None, describe_os_error(error))
    result, failure = broadcast_object(mesh, outcome)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def describe_os_error(error: OSError) -> CheckpointError:
    """Returns the error a person can act on."""
    return CheckpointError(
        f"{error.filename or 'checkpoint'}: {error.strerror or error}",
        remedy="see that the disk has room and that the run directory may be written",
    )

"""The error for a clip that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sat_train.errors import SatTrainError
from sat_train.log import get_logger

log = get_logger(__name__)

_DETAIL_LENGTH = 300  # of an error that a library raised
# Causes that may be temporary: a busy disk or machine, too little memory.
PASSING_CAUSES = frozenset({"timeout", "worker died"})


class BadClip(Exception):
    """A clip that cannot give a sample. The data set catches it and takes another clip.

    Args:
        cause: One of a few categories to count by, e.g. `damaged`.
        detail: Description of the fault.
        may_pass: Whether a retry may succeed (a network error); if so, it is not remembered.
    """

    def __init__(self, cause: str, detail: str, *, may_pass: bool = False) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail
        self.may_pass = may_pass

    def __reduce__(self) -> tuple[Any, ...]:
        return _bad_clip, (self.cause, self.detail, self.may_pass)  # ranks tell each other


@contextmanager
def one_clip() -> Iterator[None]:
    """Converts any error while one clip is processed into a `BadClip` of that clip.

    Decoders and libraries fail in as many ways as there are odd files: no list of errors would be complete.

    Raises:
        BadClip: In place of any exception but errors of the whole run (`SatTrainError`), which pass through.
    """
    try:
        yield
    except (BadClip, SatTrainError):
        raise
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())
        log.debug("a clip fails", exc_info=error)
        raise BadClip("unreadable", detail[:_DETAIL_LENGTH]) from error


def _bad_clip(cause: str, detail: str, may_pass: bool) -> BadClip:
    return BadClip(cause, detail, may_pass=may_pass)

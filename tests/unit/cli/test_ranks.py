"""From whatever ends the work to an exit code and one message."""

from __future__ import annotations

import signal

import pytest

from sat_train.cli import ranks
from sat_train.errors import Stopped


def raise_inside_a_class_body() -> None:
    """Python wraps what `__set_name__` raises, a signal's request to stop too."""

    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            raise Stopped(signal.SIGTERM, "stopped before the first step")

    class Owner:
        field = Field()


def raise_while_another_is_handled() -> None:
    try:
        raise Stopped(signal.SIGTERM, "stopped before the first step")
    except Stopped:
        raise ValueError("cleaning up failed")  # noqa: B904  as a library would


@pytest.mark.parametrize("work", [raise_inside_a_class_body, raise_while_another_is_handled])
def test_a_request_to_stop_is_seen_through_what_wraps_it(work, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((RuntimeError, ValueError, Stopped)) as caught:
        work()
    code = ranks._report(caught.value, ranks.RankEnv.single(), None)
    assert code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped before the first step\n"

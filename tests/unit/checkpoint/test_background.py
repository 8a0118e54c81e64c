from __future__ import annotations

import threading

import pytest
import torch

from sat_train.checkpoint.background import BackgroundWriter
from sat_train.checkpoint.fragments import Fragment
from sat_train.checkpoint.publish import RankReport
from sat_train.checkpoint.run_state import RunState


def state_of(value: float) -> RunState:
    """A state whose tensors are views of two storages, as those of an engine are."""
    flat, weights = torch.full((10,), value), torch.full((2, 6), value)
    fragments = [
        Fragment("a", (2, 3), 0, {"master": flat[:6]}, {"step": 1}, {"rows": weights[0]}),
        Fragment("b", (4,), 0, {"master": flat[6:]}),
    ]
    return RunState({"a": weights[:, :3], "b": weights[0, 2:]}, fragments, {})


@pytest.mark.parametrize("ranks_here", [1, 10**15])
def test_what_is_written_is_the_state_at_the_start_with_room_for_a_copy_and_without(ranks_here: int) -> None:
    writer = BackgroundWriter(only_with_room=True, ranks_here=ranks_here)
    for value in (1.0, 2.0):
        state, stepped, seen = state_of(value), threading.Event(), list[RunState]()

        def write(
            written: RunState, stepped: threading.Event = stepped, seen: list[RunState] = seen
        ) -> RankReport:
            if ranks_here == 1:
                stepped.wait()
            seen.append(written.with_tensors([tensor.clone() for tensor in written.tensors]))
            return RankReport(failure="none")

        wait = writer.start(state, write)
        assert writer.is_writing == (ranks_here == 1)
        writer.wait_until_copied()
        for tensor in state.tensors:
            tensor.zero_()
        stepped.set()
        assert wait() == RankReport(failure="none")
        assert not writer.is_writing
        assert all(torch.equal(a, b) for a, b in zip(seen[0].tensors, state_of(value).tensors, strict=True))
        assert seen[0].fragments[0].scalars == {"step": 1}

"""What is said of work in progress."""

from __future__ import annotations

import re

from sat_train.distributed.processes import start_single_process
from sat_train.distributed.work_queue import WorkQueue
from sat_train.encoding.work_progress import WorkProgress


def test_rate_and_remaining_time_are_those_of_the_whole_run(caplog) -> None:
    queues = [WorkQueue(start_single_process(), f"part {number}", 600) for number in range(2)]
    with WorkProgress("samples", queues, is_shown=True) as progress:
        assert progress.describe(0) == "samples: 0 of 1,200"
        taken = list(progress.awaited(range(300)))
        queues[1].finish_one()
        progress.update()  # too soon to say anything
        text = progress.describe(300)
    assert taken == list(range(300))
    assert not caplog.text
    found = re.fullmatch(r"samples: 300 of 1,200 \(25%\), (\S+) samples/s, eta (\d+)s", text)
    assert found
    assert int(found[2]) <= 1 + 900 / float(found[1].replace(",", "")) * 1.01

"""A rank that hangs ends when another one has failed, and shows the first error."""

import json
import subprocess
import sys

from sat_train.distributed.failures import report_to_torchrun

RANK = """
import sys, time
from datetime import timedelta
import torch.distributed as dist
from sat_train.distributed.failures import FailureBoard
rank, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=60))
board = FailureBoard(store, rank)
board.watch()
if rank == 1:
    print(board.first("the disk is full"))
    print(board.first("and something else"))
    sys.exit(3)
time.sleep(120)
"""


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_first_failure_ends_all_ranks():
    port = str(_free_port())
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), port], stdout=-1, stderr=-1, text=True)
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=90) for process in ranks]
    assert [process.returncode for process in ranks] == [1, 3]
    assert outputs[0][1].strip() == "rank 1: the disk is full"
    assert outputs[1][0].splitlines() == ["rank 1: the disk is full"] * 2


def test_torchrun_gets_the_message_for_its_summary(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    report_to_torchrun("the disk is full")
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "the disk is full"

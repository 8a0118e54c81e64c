"""What a process does when it is asked to stop; each law is tried on a real process with real signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

_HEAD = """
import os, signal, sys, time
from sat_train.errors import Stopped
from sat_train.log import configure_logging
from sat_train.distributed.signals import StopRequest
configure_logging()
request = StopRequest().listen()
def ready(): print("ready", flush=True)
# in pieces: no handler runs for a signal that comes between the last line of Python and a long sleep
def wait():
    while True: time.sleep(0.1)
"""


def _start(body: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HEAD + body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_there_is_work_a_signal_ends_the_command_clearly(number):
    process = _start(
        "try:\n    ready(); wait()\nexcept Stopped as stop: print(stop); sys.exit(stop.exit_code)\n"
    )
    process.send_signal(number)
    code, out, _ = _end(process)
    assert code == 128 + number
    assert out == f"{number.name}: stopped before the first step; nothing was trained\n"


def test_a_later_request_takes_over_and_nothing_listens_twice():
    process = _start(
        "import threading\n"
        "later = StopRequest('stopped later').listen()\n"
        "threads = [thread.name for thread in threading.enumerate()]\n"
        "assert threads.count('stop-signals') == 1, threads\n"
        "try:\n    ready(); wait()\nexcept Stopped as stop: print(stop); sys.exit(stop.exit_code)\n"
    )
    process.send_signal(signal.SIGTERM)
    assert _end(process)[:2] == (128 + signal.SIGTERM, "SIGTERM: stopped later\n")


@pytest.mark.parametrize("lost_in", ["fork", "destructor"])
def test_a_signal_where_the_interpreter_swallows_what_is_raised_is_not_lost(lost_in):
    """At a fork and in destructors Python prints what is raised and continues."""
    lose = {
        "fork": "os.register_at_fork(after_in_parent=hit)\n    if not os.fork(): os._exit(0)\n",
        "destructor": "class Lost:\n        __del__ = hit\n    Lost()\n",
    }[lost_in]
    process = _start(
        "def hit(*_): signal.raise_signal(signal.SIGINT); time.sleep(0.01)\n"
        f"try:\n    ready()\n    {lose}    wait()\n"
        "except Stopped as stop: print(stop); sys.exit(stop.exit_code)\n"
    )
    code, out, err = _end(process)
    assert (code, err) == (130, "")
    assert out == "SIGINT: stopped before the first step; nothing was trained\n"


@pytest.mark.parametrize(("number", "level"), [(signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGUSR1, 1)])
def test_once_there_is_work_the_first_signal_is_remembered(number, level):
    process = _start(
        "request.defer(); ready()\nwhile not request: time.sleep(0.01)\n"
        "time.sleep(0.2)\nprint(request.level)\n"
    )
    process.send_signal(number)
    code, out, err = _end(process)
    assert (code, out) == (0, f"{level}\n")
    assert f"{number.name}: stopping after this step" in err


def test_a_warning_of_the_scheduler_is_heeded_before_there_is_work_too():
    process = _start("ready()\nwhile not request: time.sleep(0.01)\nprint(request.signal_name)\n")
    process.send_signal(signal.SIGUSR1)
    assert _end(process)[:2] == (0, "SIGUSR1\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_within_a_second_are_one_and_a_later_one_ends_at_once(number):
    """Even where no handler can run: the main thread waits in C, as in a collective whose peer is gone."""
    process = _start(
        "import ctypes\nrequest.defer(); ready()\nmutex = ctypes.create_string_buffer(64)\n"
        "lock = ctypes.CDLL(None).pthread_mutex_lock\nlock(mutex); lock(mutex)\n"
    )
    for _ in range(3):
        process.send_signal(number)
        time.sleep(0.1)
    assert process.poll() is None
    time.sleep(1)
    process.send_signal(number)
    code, _, err = _end(process)
    assert code == 128 + number
    assert err.splitlines()[-1].endswith(f"{number.name} again: ended at once; what was saved is intact")


def test_repeated_warnings_of_a_scheduler_and_the_signal_they_announce_leave_time_to_save():
    process = _start("request.defer(); ready()\ntime.sleep(3)\nprint(request.signal_name)\n")
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.6)
    assert _end(process)[:2] == (0, "SIGUSR1\n")


def test_a_signal_to_a_forked_child_is_none_to_the_run():
    process = _start(
        "request.defer()\nchild = os.fork()\n"
        "if child == 0:\n    time.sleep(60)\n    os._exit(0)\n"
        "time.sleep(0.2); os.kill(child, signal.SIGTERM); ready(); time.sleep(0.5)\n"
        "os.kill(child, signal.SIGKILL); os.waitpid(child, 0); print(bool(request))\n"
    )
    code, out, err = _end(process)
    assert (code, out, err) == (0, "False\n", "")

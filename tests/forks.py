"""Processes that begin with everything imported: forks of one process, which imports it once a session.

Importing torch, DeepSpeed and SAT takes six seconds, and tests of ranks and of whole commands need processes
of their own. Some commands of `test_readme.py` and `test_newcomer.py`, and all of `tests/slurm`, are started
without it, as a shell does.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.runs.launching import ROOT, Finished, command, environment, run_words

_IN_FOLDER = "import os, sys; os.chdir(sys.argv.pop(1))\n"
_SAT_TRAIN = f"{_IN_FOLDER}from sat_train.cli.main import main; sys.exit(main(sys.argv[1:]))"
_SCRIPT = f"{_IN_FOLDER}import runpy; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"


def start_fork(function: Callable[..., None], *args: Any) -> BaseProcess:
    """Starts a process that calls a module-level function."""
    # no daemon: these processes have children, as in training
    process = fork_context().Process(target=function, args=args, daemon=False)
    process.start()
    return process


def fork_context() -> ForkServerContext:
    """Returns the context of forks; the one process behind it is started for the first of them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imports"])
    return context


class ForkedCommand:
    """A command that runs in a process group of its own: what `subprocess.Popen` offers of it."""

    def __init__(self, words: Sequence[str], *, log: Path, variables: Mapping[str, str]) -> None:
        log.touch()
        self._process = start_fork(_become, list(words), str(log), dict(variables))
        assert self._process.pid is not None
        self.pid = self._process.pid
        atexit.register(self.kill)  # multiprocessing would wait for it when the session ends
        with suppress(ProcessLookupError):  # it may have ended
            while os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal; None while the command runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the exit code.

        Raises:
            subprocess.TimeoutExpired: The command takes longer.
        """
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self.send_signal(signal.SIGKILL)


def start_python(
    words: Sequence[str], *, log: Path, variables: Mapping[str, str] | None = None
) -> ForkedCommand:
    """Starts `python WORDS`, a script or `-c CODE`.

    Args:
        words: The words after `python`.
        log: File for its output.
        variables: Environment variables besides those of this process.
    """
    return ForkedCommand(words, log=log, variables={**environment(), **(variables or {})})


def start(script: str, words: Sequence[str], *, log: Path) -> ForkedCommand:
    """Starts a launch script on one rank, as `launching.start` does."""
    return start_python(command(script, words, processes=1)[1:], log=log)


def start_sat_train(words: Sequence[str], *, cwd: Path, log: Path) -> ForkedCommand:
    """Starts `sat-train WORDS` in a folder."""
    return start_python(["-c", _SAT_TRAIN, str(cwd), *words], log=log)


def run(script: str, words: Sequence[str], *, timeout_s: float = 300) -> Finished:
    """Runs a launch script on one rank to its end, as `launching.run` does."""
    return _end(lambda log: start(script, words, log=log), timeout_s)


def run_sat_train(words: Sequence[str], *, cwd: Path = ROOT, timeout_s: float = 300) -> Finished:
    """Runs `sat-train WORDS` in a folder to its end."""
    return _end(lambda log: start_sat_train(words, cwd=cwd, log=log), timeout_s)


def run_line(line: str, *, cwd: Path) -> Finished:
    """Types a line into a shell in a folder; `sat-train` and `python` are forks, with the words it splits."""
    code = {"sat-train": _SAT_TRAIN, "python": _SCRIPT}.get(line.split()[0])
    if code is None:
        return run_words(["bash", "-c", line], cwd=cwd)
    words = ["-c", code, str(cwd), *shell_words(line, cwd=cwd)[1:]]
    return _end(lambda log: start_python(words, log=log), timeout_s=300)


def shell_words(line: str, *, cwd: Path) -> list[str]:
    """Returns the words that a shell makes of a line: unquoted, its `$(...)` run, its `*` found."""
    split = run_words(["bash", "-c", f"printf '%s\\0' {line}"], cwd=cwd)
    assert split.returncode == 0, split.output
    return split.output.split("\0")[:-1]


def _end(start_it: Callable[[Path], ForkedCommand], timeout_s: float) -> Finished:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        process = start_it(log)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
        return Finished(code, log.read_text(encoding="utf-8"))


def _become(words: list[str], log: str, variables: dict[str, str]) -> None:
    """Runs a script or code as the main program of this process."""
    os.setsid()
    with open(log, "wb") as output, open(os.devnull, "rb") as nothing:
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source.fileno(), target)
    os.environ.clear()
    os.environ.update(variables)
    multiprocessing.set_start_method(None, force=True)  # as in any program, not as this one began
    try:
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as at the end of any program; multiprocessing leaves them out

"""Runs cases in processes of their own and says what each did that it must not do."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from tests.forks import fork_context
from tests.hostile.case import SECRET, Case, Field

MAX_SECONDS = 20.0
MAX_BYTES = 2_000_000_000
_FORBIDDEN_EVENTS = (
    *("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"),
    *("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"),
)
# DeepSpeed looks for libraries in these ways; the compiler may have its platform in front of its name.
_PROBES = re.compile(r"([\w-]+-)?gcc|/sbin/ldconfig|ld|objdump")
_ESCAPES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_LIVE_TAGS = ("script", "iframe", "object", "embed", "link", "base", "form", "a", "foreignobject")
_PROGRESS = re.compile(r"\x1b\[\??[0-9;]*[a-zA-Z]|\r")  # what a progress bar of ours prints


@dataclass(frozen=True)
class Outcome:
    """What a case did.

    Args:
        case: Its name.
        problems: What it must not have done; empty when all is well.
        seconds: How long it took.
        bytes: How much its memory grew at most.
        output: What it printed.
    """

    case: str
    problems: tuple[str, ...]
    seconds: float
    bytes: int
    output: str


class Guard:
    """Forks a process for each case from one that has imported everything already.

    Args:
        root: A folder for the files of the cases.
        seconds: How long one may take; more than `MAX_SECONDS` on a machine that is busy with other things.
    """

    def __init__(self, root: Path, *, seconds: float = MAX_SECONDS) -> None:
        os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        self._root, self._seconds = root, seconds
        self._context = fork_context()
        first = self._context.Process(target=_import_everything)  # no case shall wait for it
        first.start()
        first.join()
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._server.setblocking(False)

    def run(self, case: Case) -> Outcome:
        """Runs one case and deletes its files."""
        place = self._root / "case"
        shutil.rmtree(place, ignore_errors=True)
        field = Field(place / "inside", place / "outside", self._server.getsockname()[1])
        field.inside.mkdir(parents=True)
        field.outside.mkdir()
        field.secret.write_text(f"{SECRET}\n")
        field.victim.write_text("mine\n")
        words = case.make(field)
        log, report = place / "log", place / "report"
        watched = str(field.outside) if case.opens_nothing else ""
        process = self._context.Process(target=_perform, args=(words, field, str(log), str(report), watched))
        begin = time.monotonic()
        process.start()
        process.join(self._seconds)
        seconds = time.monotonic() - begin
        timed_out = process.is_alive()
        _end_group(process.pid)
        process.join()
        output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        events, grown = _read_report(report)
        problems = [f"took more than {self._seconds:.0f} s"] if timed_out else []
        if not timed_out and process.exitcode not in case.codes:
            problems.append(f"exit code {process.exitcode}")
        problems += _problems(output, events, grown, field, case) + self._connections()
        shutil.rmtree(place, ignore_errors=True)
        return Outcome(case.name, tuple(problems), seconds, grown, output)

    def close(self) -> None:
        """Closes the server that counts."""
        self._server.close()

    def _connections(self) -> list[str]:
        count = 0
        while True:
            try:
                self._server.accept()[0].close()
            except BlockingIOError:
                return [f"{count} connections"] if count else []
            count += 1


def _problems(output: str, events: list[str], grown: int, field: Field, case: Case) -> list[str]:
    problems = [f"audit: {event}" for event in events]
    if "Traceback (most recent call last)" in output:
        problems.append("traceback")
    if grown > MAX_BYTES:
        problems.append(f"memory grew by {grown / 1e9:.1f} GB")
    if field.executed.exists():
        problems.append("a payload was executed")
    if not field.victim.exists() or field.victim.read_text() != "mine\n":
        problems.append("a file outside was changed")
    if sorted(path.name for path in field.outside.iterdir() if path != field.executed) != [
        "secret.txt",
        "victim.txt",
    ]:
        problems.append("a file was made outside")
    if not case.reads_secret and (SECRET in output or _holds_secret(field.inside)):
        problems.append("a secret was taken along")
    if _ESCAPES.search(_PROGRESS.sub("", output)):
        problems.append("control characters were shown")
    return [*problems, *_live_html(field.inside)]


class _Page(HTMLParser):
    """Collects what of a page is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _LIVE_TAGS:
            self.alive.append(tag)
        for name, value in attrs:
            leads_away = name in ("src", "href", "xlink:href") and not (value or "").startswith("data:image/")
            if name.startswith("on") or leads_away:
                self.alive.append(f"{tag} {name}")


def _live_html(folder: Path) -> list[str]:
    """Names what the pages of a command hold that runs or asks somebody."""
    alive: list[str] = []
    for path in folder.glob("data_report/*.html"):
        page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
        alive += page.alive
    return [f"live HTML: {', '.join(sorted(set(alive)))}"] if alive else []


def _holds_secret(folder: Path) -> bool:
    """Tells whether a regular file of the case holds the secret, in its content or its name."""
    for path in folder.rglob("*"):
        if SECRET in path.name:
            return True
        is_small = path.is_file() and not path.is_symlink() and path.stat().st_size < 50_000_000
        if is_small and SECRET.encode() in path.read_bytes():
            return True
    return False


def _read_report(report: Path) -> tuple[list[str], int]:
    if not report.exists():
        return [], 0
    *events, grown = report.read_text(encoding="utf-8", errors="replace").splitlines()
    return events, int(grown)


def _end_group(leader: int | None) -> None:
    """Ends a case with the processes it started: those that read clips outlive it otherwise."""
    assert leader is not None
    with contextlib.suppress(ProcessLookupError):  # it has ended, and nothing of it is left
        os.killpg(leader, signal.SIGKILL)


def _import_everything() -> None:
    """Runs in the process from which the others are forked, once that has imported everything."""


def _perform(words: list[str], field: Field, log: str, report: str, watched: str) -> None:
    """Runs a command under watch; its exit code becomes that of the process."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(field.inside)
    os.environ.update(SECRET_TOKEN=SECRET, AWS_SECRET_ACCESS_KEY=SECRET)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    events: list[str] = []
    sys.addaudithook(lambda event, args: _note(event, args, watched, events))
    from sat_train.cli.main import main

    code = 1
    try:
        code = main(words)
    finally:
        after = max(
            resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        with open(report, "w", encoding="utf-8") as file:
            file.write("".join(f"{event}\n" for event in events) + f"{max(0, after - before) * 1024}\n")
    sys.exit(code)


def _note(event: str, args: tuple[Any, ...], watched: str, events: list[str]) -> None:
    if event == "open" and watched and str(args[0]).startswith(watched):
        events.append(f"open {args[0]}"[:200])
    is_probe = event == "subprocess.Popen" and bool(_PROBES.fullmatch(str(args[0])))
    if event in _FORBIDDEN_EVENTS and not is_probe:
        events.append(" ".join(f"{event} {args!r}".split())[:200])

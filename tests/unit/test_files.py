"""One way to read and one way to write: nothing blocks, nothing is followed, nothing is half there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from sat_train.errors import DataError, SatTrainError, printable
from sat_train.files import NotRegular, TooLarge, open_regular, read_bytes, read_text, reading, write_text


def test_a_regular_file_is_read_whole_and_its_line_ends_are_one_kind(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes("ä\r\nb\rc\n".encode())
    assert read_text(path, limit=100) == "ä\nb\nc\n"
    assert read_bytes(path, limit=8) == "ä\r\nb\rc\n".encode()


@pytest.mark.parametrize("kind", ["fifo", "device", "socket", "folder", "link to a device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(OSError):  # a socket cannot even be opened
        open_regular(path)
    if kind != "socket":
        with pytest.raises(NotRegular, match="not a regular file"):
            open_regular(path)


def test_a_file_over_its_cap_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TooLarge, match="more than 1,000 bytes"):
        read_bytes(path, limit=1000)


@pytest.mark.parametrize(
    "problem",
    [ValueError("bad"), RecursionError(), IndexError("x"), OSError(5, "Input/output error"), MemoryError()],
    ids=lambda problem: type(problem).__name__,
)
def test_every_failure_inside_a_reader_names_the_file(problem: Exception) -> None:
    with pytest.raises(DataError, match=r"clips\.json: .+\n  expected: a list\n  remedy:   write one"):  # noqa: SIM117
        with reading("clips.json", error=DataError, expected="a list", remedy="write one"):
            raise problem


def test_an_error_that_names_its_file_already_passes_a_reader_unchanged() -> None:
    inner = DataError("row 3: no caption")
    with pytest.raises(DataError) as caught, reading("clips.json", error=DataError):
        raise inner
    assert caught.value is inner


def test_writing_replaces_a_link_and_never_what_it_points_to(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "latest"
    victim.write_text("mine")
    path.symlink_to(victim)
    (tmp_path / "latest.part").symlink_to(victim)
    write_text(path, "3")
    assert victim.read_text() == "mine"
    assert path.read_text() == "3"
    assert not path.is_symlink()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    path.write_text("3")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("latest", "3")]


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("plain", "plain"),
        ("ein Ä,\u3000视频", "ein Ä,\u3000视频"),
        ("two\n\tlines", "two\n\tlines"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("back\rover", "back\\rover"),
        ("\ud800", "\\ud800"),
        ("txt.\u202egpj", "txt.\\u202egpj"),
        ("\x9b31m", "\\x9b31m"),
        ("", ""),
    ],
)
def test_shown_text_steers_no_terminal(text: str, output: str) -> None:
    assert printable(text) == output
    assert str(SatTrainError(f"a{text}")) == f"a{output}"

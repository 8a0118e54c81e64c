"""Hostile clips: folders, links, playlists, pictures, captions and names."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from tests.hostile.case import Case, Field
from tests.hostile.clips import LEFT_OUT, PLACES, PLAYLISTS, data_case, good_set, turn
from tests.hostile.words import INSPECT, PREVIEW
from tests.unit.data.sources.test_hostile import sparse


def cases() -> Iterator[Case]:
    """Gives all hostile data; each kind meets each command in turn."""
    yield from _folder_cases()
    yield from _video_cases()
    yield from _shown_cases()


def _folder_cases() -> Iterator[Case]:
    files = ("labels/good1.txt", "videos/good1.mp4", "images/good1.png", "labels", "videos")
    number = 0
    for file in files:
        for kind, place in PLACES.items():

            def prepare(
                field: Field, file: str = file, place: Callable[[Path, Field], object] = place
            ) -> None:
                path = good_set(field.inside / "set") / file
                path.parent.mkdir(exist_ok=True)
                if path.exists():
                    path.rename(field.inside / "away")
                place(path, field)

            yield data_case(f"{file} is {kind}", turn(number), prepare, "set", codes=LEFT_OUT)
            number += 1
    for kind in ("a folder above", "two folders in a circle", "the root of the disk"):

        def around(field: Field, kind: str = kind) -> None:
            root = good_set(field.inside / "set")
            to = {"a folder above": "../..", "two folders in a circle": "../videos"}.get(kind, "/")
            (root / "videos" / "again").symlink_to(to)

        yield data_case(f"a link to {kind}", "inspect", around, "set", codes=LEFT_OUT)
    for name, content in {
        "lists of the secret": "../../outside/secret.txt\n",
        "lists of passwords": "/etc/passwd\n",
        "lists of addresses": "http://127.0.0.1:{port}/a.mp4\n",
        "lists of NULs": "a\0b.mp4\n",
    }.items():

        def listed(field: Field, content: str = content) -> None:
            (field.inside / "set").mkdir()
            (field.inside / "set" / "videos.txt").write_text(content.replace("{port}", str(field.port)))
            (field.inside / "set" / "prompt.txt").write_text("a caption\n")

        yield data_case(name, "inspect", listed, "set", codes=LEFT_OUT)


def _video_cases() -> Iterator[Case]:
    for number, (name, text) in enumerate(PLAYLISTS.items()):
        for suffix in ("mp4", "png") if name in ("SVG", "EPS") else ("mp4",):

            def listed(field: Field, text: str = text, suffix: str = suffix) -> None:
                filled = text.replace("{port}", str(field.port)).replace("{secret}", str(field.secret))
                root = good_set(field.inside / "set")
                (root / "videos" / f"evil.{suffix}").write_text(filled, encoding="latin-1")
                (root / "labels" / "evil.txt").write_text("evil\n")

            yield data_case(f"a .{suffix} of {name}", turn(number), listed, "set", codes=LEFT_OUT)
    for number, (name, draw) in enumerate(_PICTURES.items()):

        def drawn(field: Field, draw: Callable[[Path], object] = draw) -> None:
            root = good_set(field.inside / "set")
            draw(root / "videos" / "evil.png")
            (root / "labels" / "evil.txt").write_text("evil\n")

        yield data_case(f"a picture, {name}", turn(number), drawn, "set", codes=LEFT_OUT)


def _claim(path: Path) -> None:
    Image.new("L", (64, 64)).save(path.with_suffix(".jpg"))
    jpeg = bytearray(path.with_suffix(".jpg").read_bytes())
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 65500, 65500)
    path.with_suffix(".jpg").unlink()
    path.write_bytes(jpeg)


_PICTURES: dict[str, Callable[[Path], object]] = {
    "a bomb": lambda path: Image.new("1", (20_000, 20_000)).save(path, "PNG"),
    "a claim": _claim,
    "empty": lambda path: path.write_bytes(b""),
    "a header": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40)),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "a TIFF of itself": lambda path: path.write_bytes(b"II*\0\x08\0\0\0\0\0\x08\0\0\0"),
    "sparse": lambda path: sparse(path, head=b"\x89PNG\r\n\x1a\n"),
}
_CAPTIONS = {
    "script": "<script>fetch('http://127.0.0.1:{port}/')</script>",
    "image": "<img src=x onerror=alert(1)>",
    "closing": "</figcaption></div></style></title><svg onload=alert(1)>",
    "frame": "<iframe src='http://127.0.0.1:{port}/'></iframe>",
    "quotes": "' onmouseover='alert(1)' x=\" onmouseover=\"alert(1)",
    "address": "<base href='http://127.0.0.1:{port}/'><link rel=stylesheet href=//127.0.0.1:{port}/a.css>",
    "entities": "&lt;script&gt;&#60;script&#62;",
    "escapes": "\x1b[2J\x1b]0;owned\x07\x1b]8;;http://x\x07link\x9b31m",
    "direction": "a \u202egnp.exe\u2066",
    "letters beyond all": "\u0301" * 5000,
    "a reference": "${oc.env:SECRET_TOKEN} {{SECRET_TOKEN}} %(SECRET_TOKEN)s $SECRET_TOKEN",
    "markup": "[link=http://x]a[/link][/red][bold]",
}
_CLIP_NAMES = {
    "HTML": "<img src=x onerror=alert(1)>",
    "escapes": "\x1b[2J\x1b]0;owned\x07",
    "line break": "a\nb",
    "direction": "a\u202egnp",
    "bytes": b"\xff\xfe".decode("utf-8", "surrogateescape"),
    "250 letters": "x" * 250,
    "markup": "[bold red][link=x]",
    "a protocol": "concat:a|b",
    "a number": "%05d",
}


def _shown_cases() -> Iterator[Case]:
    for number, (name, text) in enumerate(_CAPTIONS.items()):

        def captioned(field: Field, text: str = text) -> None:
            root = good_set(field.inside / "set")
            (root / "labels" / "good1.txt").write_text(text.replace("{port}", str(field.port)))

        for command in ("inspect", turn(1 + number % 3)):
            yield data_case(f"a caption of {name}", command, captioned, "set", codes=LEFT_OUT)
    for number, (name, clip) in enumerate(_CLIP_NAMES.items()):

        def named(field: Field, clip: str = clip) -> None:
            good_set(field.inside / "set", clip, "good1", "good2")

        for command in ("inspect", turn(1 + number % 3)):
            yield data_case(f"a name of {name}", command, named, "set", codes=LEFT_OUT)
    yield Case("data: the page is a link to a file outside", _page_link, codes=(0, 2))
    yield Case("data: the preview is a link to a folder outside", _preview_link, codes=(0, 2))


def _page_link(field: Field) -> list[str]:
    good_set(field.inside / "set")
    (field.inside / "data_report").mkdir()
    (field.inside / "data_report" / "index.html").symlink_to(field.victim)
    return [*INSPECT, "args.train_data=[set]"]


def _preview_link(field: Field) -> list[str]:
    good_set(field.inside / "set")
    (field.inside / "data_report").mkdir()
    for name in ("0000.mp4", "contact_sheet.png"):
        (field.inside / "data_report" / name).symlink_to(field.victim)
    return [*PREVIEW, "args.train_data=[set]"]

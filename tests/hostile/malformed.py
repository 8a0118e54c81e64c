"""Malformed files, words and manifests against every command that reads them: one message and exit code 2.

Nothing here is clever; it is what a slip of the finger, a half-written file or another tool's format gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.hostile.case import Case, Field
from tests.hostile.words import INSPECT, PRECOMPUTE, SAMPLE, TRAIN
from tests.unit.config.test_malformed_corpus import FILES, WORDS

_WEIGHTS = Path(__file__).resolve().parents[2] / "sat_train" / "assets" / "tiny" / "dit.safetensors"
_CHECK = ["check", "--base", "configs/sft.yaml"]
_COMMANDS = {
    "check": _CHECK,
    "train": TRAIN,
    "precompute": PRECOMPUTE,
    "inspect": INSPECT,
    "sample": [*SAMPLE, "--prompt", "x"],
}
_CONVERT = ["convert", str(_WEIGHTS), "out", "--to", "diffusers", "--base"]
_UNREAD = ("args.load=", "args.resume=")  # keys that commands which only look at data do not use
_MANIFESTS = {
    "a.jsonl": (
        b"",
        b"\n\n",
        b"{",
        b"[]",
        b"5",
        b'"x"',
        b"null",
        b'{"video": "a.mp4"}',
        b'{"caption": "x"}',
        b'{"video": 5, "caption": "x"}',
        b'{"video": "", "caption": "x"}',
        b'{"video": "a.mp4", "caption": 5}',
        b'{"video": "no.mp4", "caption": "x"}',
        b'{"video": "a.mp4", "caption": "x", "weight": "much"}',
        b'{"video": "a.mp4", "caption": "x", "weight": -1}',
        b'{"video": "a.mp4", "caption": "x", "start": "soon"}',
        b'{"video": "a.mp4", "caption": "x", "start": 5, "end": 1}',
        b'{"video": "a.mp4", "caption": "\xff"}',
        b"[" * 100_000,
        b'{"video": ' + b"9" * 5_000 + b"}",
        b'{"video": "a.mp4", "video": "b.mp4", "caption": "x"',
    ),
    "a.json": (
        b"",
        b"{",
        b"{}",
        b"[]",
        b"[5]",
        b'{"video": ["a"], "caption": ["b"]}',
        b"[[1]]",
        b"\xff\xfe[]",
    ),
    "a.csv": (
        b"",
        b"\n",
        b"video,caption",
        b"a,b\n1,2\n",
        b"video,video\na,b\n",
        b"video;caption,text\na;b,c\n",
        b'video,caption\n"a,b\n',
        b"video,caption\na.mp4\n",
        b"video,caption\na.mp4,x,y,z\n",
        b"video,caption\n" + b"a" * 200_000 + b",x\n",
        b"video,caption\n\xff,\xff\n",
        b"video,caption\n\0,x\n",
    ),
    "a.parquet": (b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"not parquet at all"),
    "a.tar": (b"", b"\0" * 1024, b"x" * 512, b"not a tar" * 200),
    "a.txt": (b"", b"a.mp4\n"),
    "a.mp4": (b"", b"\0\0\0\x18ftypmp42"),
}


def cases() -> Iterator[Case]:
    """Gives each malformed file and word with each command, and each manifest with those that read data."""
    for number, text in enumerate(FILES):
        for name, words in _COMMANDS.items():
            yield _file(f"malformed: file {number}, {name}", text, words)
        yield _file(f"malformed: file {number}, convert", text, _CONVERT)
    for number, word in enumerate(WORDS):
        for name, words in _COMMANDS.items():
            if word == "configs/lora.yaml" or (
                name in ("precompute", "inspect") and word.startswith(_UNREAD)
            ):
                continue  # nothing is wrong with that
            yield Case(
                f"malformed: word {number}, {name}", lambda field, words=words, word=word: [*words, word]
            )
    for name, contents in _MANIFESTS.items():
        for number, content in enumerate(contents):
            for command in ("check", "train", "precompute", "inspect"):
                # check counts rows and opens no clip; inspect shows a clip that is missing on its page
                codes = (0, 2) if b"no.mp4" in content and command in ("check", "inspect") else (2,)
                yield _manifest(
                    f"malformed: {name} {number}, {command}", name, content, _COMMANDS[command], codes
                )


def _file(name: str, text: str, words: list[str]) -> Case:
    def make(field: Field) -> list[str]:
        path = field.inside / "malformed.yaml"
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        at = words.index("--base") + 1
        return (
            [*words[: at + 1], path.name, *words[at + 1 :]] if words is not _CONVERT else [*words, path.name]
        )

    return Case(name, make)


def _manifest(name: str, file: str, content: bytes, words: list[str], codes: tuple[int, ...]) -> Case:
    def make(field: Field) -> list[str]:
        (field.inside / file).write_bytes(content)
        return [*words, f"args.train_data=[{file}]"]

    return Case(name, make, codes)

"""What the families of data share: sets of clips, cases of them, and what stands where a file should."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.hostile.case import Case, Field
from tests.hostile.words import INSPECT, PRECOMPUTE, PREVIEW, TRAIN
from tests.unit.data.sources.test_hostile import sparse
from tests.unit.data.videos import write_numbered

_COMMANDS = {"inspect": INSPECT, "preview": PREVIEW, "train": TRAIN, "precompute": PRECOMPUTE}
# What one bad clip among good ones does: it is named and left out, or ends the command.
LEFT_OUT = (0, 2)


@cache
def good_clip() -> bytes:
    """Returns a video of two and a half seconds."""
    with tempfile.TemporaryDirectory() as folder:
        write_numbered(Path(folder) / "a.mp4", num_frames=20, rate=8, side=96)
        return (Path(folder) / "a.mp4").read_bytes()


def good_set(root: Path, *names: str) -> Path:
    """Makes a set of clips with captions."""
    (root / "videos").mkdir(parents=True)
    (root / "labels").mkdir()
    for name in names or ("good0", "good1", "good2"):
        (root / "videos" / f"{name}.mp4").write_bytes(good_clip())
        (root / "labels" / f"{name}.txt").write_bytes(f"clip {name}\n".encode("utf-8", "surrogateescape"))
    return root


def data_case(name: str, command: str, prepare: Callable[[Field], object], entry: str, **more: Any) -> Case:
    """Returns a case in which a command meets one entry of `args.train_data`."""

    def make(field: Field) -> list[str]:
        prepare(field)
        return [*_COMMANDS[command], f"args.train_data=[{entry}]"]

    return Case(f"data: {name}, {command}", make, **more)


def turn(number: int) -> str:
    """Returns the command whose turn it is."""
    return list(_COMMANDS)[number % len(_COMMANDS)]


PLACES: dict[str, Callable[[Path, Field], object]] = {
    "a FIFO": lambda path, field: os.mkfifo(path),
    "a link to a device": lambda path, field: path.symlink_to("/dev/zero"),
    "a link to the secret": lambda path, field: path.symlink_to(field.secret),
    "a link to passwords": lambda path, field: path.symlink_to("/etc/passwd"),
    "a link to itself": lambda path, field: path.symlink_to(path.name),
    "20 GB of zeros": lambda path, field: sparse(path),
    "a folder": lambda path, field: path.mkdir(),
}


_HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n"
PLAYLISTS = {
    "ffconcat of the secret": "ffconcat version 1.0\nfile {secret}\n",
    "ffconcat of an address": "ffconcat version 1.0\nfile http://127.0.0.1:{port}/a.mp4\n",
    "HLS of the secret": _HLS + "#EXTINF:10,\n{secret}\n#EXT-X-ENDLIST\n",
    "HLS of an address": _HLS + "#EXTINF:10,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
    "HLS of a joined address": _HLS
    + "#EXTINF:10,\nconcat:http://127.0.0.1:{port}/?x=|file://{secret}\n#EXT-X-ENDLIST\n",
    "HLS with a key": _HLS
    + '#EXT-X-KEY:METHOD=AES-128,URI="http://127.0.0.1:{port}/k"\n#EXTINF:10,\na.ts\n#EXT-X-ENDLIST\n',
    "HLS in an AVI": "RIFF\0\0\0\0AVI " + _HLS + "#EXTINF:1,\nhttp://127.0.0.1:{port}/a.ts\n",
    "DASH": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
    '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
    "<BaseURL>http://127.0.0.1:{port}/a.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "rtsp": "[Reference]\nRef1=http://127.0.0.1:{port}/a.mp4\nrtsp://127.0.0.1:{port}/a\n",
    "SVG": '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    '<image xlink:href="{secret}"/><image xlink:href="http://127.0.0.1:{port}/a.png"/></svg>',
    "XML that includes": '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x SYSTEM "file://{secret}">]><a>&x;</a>',
    "Matroska of segments": "\x1aE\xdf\xa3\x01\x00\x00\x00\x00\x00\x00\x1fB\x82\x84webm{secret}",
    "index of subtitles": "# VobSub index file, v7 (do not modify this line!)\nid: en, index: 0\n",
    "AVISynth": 'DirectShowSource("{secret}")\n',
    "a filter graph": "movie={secret}\n",
    "metadata": ";FFMETADATA1\ntitle={secret}\n",
    "EPS": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) run\n",
    "a script": "#!/bin/sh\ntouch {secret}.new\n",
}

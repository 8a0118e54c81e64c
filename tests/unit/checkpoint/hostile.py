"""Files of weights as nobody writes them by mistake: functions of a folder that return their path."""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

NAME = "time_embed.0.weight"
Maker = Callable[[Path], Path]


class Evil:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return self.call[0], self.call[1:]


def marker(folder: Path) -> Path:
    return folder / "code_ran"


def _write(name: str, content: bytes) -> Maker:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def zipped(pickled: bytes, *, compression: int = zipfile.ZIP_STORED, data: bytes = b"") -> Maker:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "w.pt", "w", compression) as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/byteorder", "little")
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/data/0", data)
        return folder / "w.pt"

    return make


def saved(build: Callable[[], object], **options: object) -> Maker:
    def make(folder: Path) -> Path:
        torch.save(build(), folder / "w.pt", **options)
        return folder / "w.pt"

    return make


PICKLES = {
    "stop only": b".",
    "nothing on the stack": b"\x80\x020.",
    "unknown opcode": b"\x80\x02\xff.",
    "protocol 200": b"\x80\xc8}.",
    "no stop": b"\x80\x02}",
    "memo that is not there": b"\x80\x02h\x09.",
    "marks without end": b"\x80\x02(((((t.",
    "setitem on a number": b"\x80\x02K\x01K\x02K\x03s.",
    "append to a number": b"\x80\x02K\x01K\x02a.",
    "build a number": b"\x80\x02K\x01}b.",
    "reduce a number": b"\x80\x02K\x01)R.",
    "newobj of a number": b"\x80\x02K\x01)\x81.",
    "text that is not utf-8": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "text longer than the file": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "a number of 2 billion bytes": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "eval": b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
    "os.system": b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
    "getattr": b"\x80\x02cbuiltins\ngetattr\n.",
    "torch.load itself": b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    "tensor of wrong arguments": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nK\x01\x85R.",
    "parameter of a number": b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\x01K\x01K\x01\x87R.",
    "persistent id of a number": b"\x80\x02K\x01Q.",
    "persistent id of another storage": pickle.dumps("x", 2)[:-1] + b"Q.",
    "100000 nested lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "100000 nested tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "a list": b"\x80\x02].",
    "an empty dictionary": b"\x80\x02}.",
}
TENSORS: dict[str, Callable[[], object]] = {
    "expanded": lambda: {NAME: torch.zeros(1).expand(10**12)},
    "expanded rows": lambda: {NAME: torch.zeros(1, 4).expand(10**9, 4)},
    "overlapping windows": lambda: {NAME: torch.zeros(8).as_strided((5, 4), (1, 1))},
    "sparse": lambda: {
        NAME: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), [1.0], (10**9, 10**9))
    },
    "compressed rows": lambda: {NAME: torch.eye(3).to_sparse_csr()},
    "without data": lambda: {NAME: torch.empty(10**9, 10**9, device="meta")},
    "quantised": lambda: {NAME: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.quint8)},
    "complex": lambda: {NAME: torch.ones(4, dtype=torch.complex64)},
    "bool": lambda: {NAME: torch.ones(4, dtype=torch.bool)},
    "numbers for names": lambda: {1: torch.ones(2), 2: torch.ones(2)},
    "a tuple of tensors": lambda: (torch.ones(2), torch.ones(2)),
    "texts for tensors": lambda: {"module": {NAME: "weights"}},
    "an optimizer": lambda: {"module": 7, "optimizer": [torch.ones(2)]},
    "objects of numpy": lambda: {NAME: np.array([Evil(print)], dtype=object)},
}


def header(fields: object, data: bytes = bytes(16), *, length: int | None = None) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(**changes: object) -> dict[str, object]:
    return {NAME: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


_ONE = json.dumps(tensor())[1:-1]
SAFETENSORS = {
    "length of 2**63": header(tensor(), length=2**63),
    "length beyond the file": header(tensor(), length=2**20),
    "length of zero": header(tensor(), length=0),
    "a list": header([1, 2]),
    "a text": header(b'{"a"'),
    "not utf-8": header(b'{"\xff\xfe": 1}'),
    "100000 brackets": header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a number of 5000 digits": header(b'{"a": ' + b"9" * 5000 + b"}"),
    "a name twice": header(f"{{{_ONE}, {_ONE}}}".encode()),
    "no tensors": header({}, b""),
    "unknown dtype": header(tensor(dtype="F128")),
    "8 bit": header(tensor(dtype="F8_E4M3", data_offsets=[0, 4]), bytes(4)),
    "negative shape": header(tensor(shape=[-4])),
    "shape that overflows": header(tensor(shape=[2**62, 2**62])),
    "shape beyond the data": header(tensor(shape=[10**9])),
    "shape of floats": header(tensor(shape=[4.5])),
    "offsets turned round": header(tensor(data_offsets=[16, 0])),
    "negative offsets": header(tensor(data_offsets=[-16, 0])),
    "offsets beyond the file": header(tensor(data_offsets=[0, 10**15])),
    "one offset": header(tensor(data_offsets=[0])),
    "no offsets": header({NAME: {"dtype": "F32", "shape": [4]}}),
    "overlapping tensors": header({**tensor(), "b": tensor()[NAME]}),
    "a hole between tensors": header(tensor(data_offsets=[4, 20]), bytes(20)),
    "bytes after the last": header(tensor(), bytes(64)),
    "metadata that is no text": header({"__metadata__": {"a": 1}, **tensor()}),
    "metadata that is a list": header({"__metadata__": [1], **tensor()}),
    "quantised names": header({"a" * 100_000: tensor()[NAME], "b": 1}),
}
INDEXES = {
    "a list": b"[1, 2]",
    "brackets": b"[" * 100_000,
    "no map": b"{}",
    "a map of numbers": b'{"weight_map": {"a": 1, "b": "x"}}',
    "a map of lists": b'{"weight_map": {"a": ["x"]}}',
    "outside": b'{"weight_map": {"a": "../secret.safetensors"}}',
    "absolute": b'{"weight_map": {"a": "/etc/passwd"}}',
    "its folder": b'{"weight_map": {"a": "."}}',
    "itself": b'{"weight_map": {"a": "w.safetensors.index.json"}}',
    "a NUL": b'{"weight_map": {"a": "a\\u0000b"}}',
    "a surrogate": b'{"weight_map": {"a": "\\ud800"}}',
    "5000 letters": json.dumps({"weight_map": {"a": "x" * 5000}}).encode(),
    "not utf-8": b"\xff\xfe{}",
    "nobody is there": b'{"weight_map": {"a": "gone.safetensors"}}',
}


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "w.safetensors")
    return folder / "w.safetensors"


def device(folder: Path) -> Path:
    (folder / "w.safetensors").symlink_to("/dev/zero")
    return folder / "w.safetensors"


def fifo_in_a_folder(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder


def folder_for_a_file(folder: Path) -> Path:
    (folder / "w.safetensors").mkdir()
    return folder / "w.safetensors"


def rank_9999999999(folder: Path) -> Path:
    (folder / "mp_rank_9999999999_model_states.pt").write_bytes(b"x")
    return folder


def latest_is_a_device(folder: Path) -> Path:
    (folder / "latest").symlink_to("/dev/zero")
    return folder


def damaged_copies(folder: Path, count: int = 24) -> Iterator[tuple[str, bytes]]:
    """Yields a good file in both formats with bytes changed at random places of its first kilobyte."""
    torch.save({NAME: torch.ones(4), "time_embed.0.bias": torch.ones(4)}, folder / "good.pt")
    good = {"pt": (folder / "good.pt").read_bytes(), "safetensors": save({NAME: torch.ones(4)})}
    generator = random.Random(7)
    for number in range(count):
        suffix = ("pt", "safetensors")[number % 2]
        content = bytearray(good[suffix])
        for _ in range(1 + number % 4):
            content[generator.randrange(min(len(content), 1000))] = generator.randrange(256)
        yield f"{number}.{suffix}", bytes(content[: generator.choice([len(content), len(content) * 2 // 3])])


CASES: dict[str, Maker] = {
    **{f"zipped pickle, {name}": zipped(content) for name, content in PICKLES.items()},
    **{f"plain pickle, {name}": _write("w.pt", content) for name, content in PICKLES.items()},
    **{f"tensor, {name}": saved(build) for name, build in TENSORS.items()},
    "code": lambda folder: saved(lambda: {NAME: Evil(os.mkdir, str(marker(folder)))})(folder),
    "packed zip": zipped(b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED, data=bytes(50_000_000)),
    **{f"safetensors, {name}": _write("w.safetensors", content) for name, content in SAFETENSORS.items()},
    **{f"index, {name}": _write("w.safetensors.index.json", content) for name, content in INDEXES.items()},
    **{
        make.__name__: make
        for make in (
            fifo,
            device,
            fifo_in_a_folder,
            folder_for_a_file,
            rank_9999999999,
            latest_is_a_device,
        )
    },
    "a path of 5000 letters": lambda folder: folder / ("x" * 5000),
    "a path with a NUL": lambda folder: folder / "a\0b",
    "nobody's home": lambda folder: Path("~nobody-of-this-name/w.pt"),
}

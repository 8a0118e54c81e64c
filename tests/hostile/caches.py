"""Hostile caches: listed, verified, pruned, and trained on."""

from __future__ import annotations

import atexit
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from sat_train.encoding.cache.shards import FOLDER, EntryInfo, Origin, ShardWriter
from tests.forks import run_sat_train
from tests.hostile.case import Case, Field
from tests.hostile.clips import good_set
from tests.hostile.words import PRECOMPUTE, TRAIN
from tests.unit.encoding.cache import test_hostile as unit
from tests.unit.encoding.cache.samples import tensors_of

_LOOKS = (
    ["list"],
    ["list", "--gone"],
    ["verify"],
    ["prune", "--gone"],
    ["prune", "--damaged"],
    ["list", "--base", "configs/sft.yaml"],
)
# A shard that cannot be read is named and left out; `verify` has an exit code of its own for it.
_CODES = (0, 1, 2)
_WINDOW = ["data.params.window=head", "args.train_data=[set]"]


def cases() -> Iterator[Case]:
    """Gives all hostile caches."""
    for number, (name, change) in enumerate(unit.CASES.items()):
        look = _LOOKS[number % len(_LOOKS)]
        yield Case(f"cache: {name}, {' '.join(look[:2])}", _looked_at(change, look), codes=_CODES)
    for name, change in _ORIGINS.items():
        for look in _LOOKS[:4]:
            yield Case(f"cache: {name}, {' '.join(look)}", _looked_at(change, look), codes=_CODES)
    for name, change in _FOLDERS.items():
        for look in (_LOOKS[0], _LOOKS[2], _LOOKS[4]):
            yield Case(f"cache: {name}, {' '.join(look)}", _folder(change, look), codes=_CODES)
    for name, change in _TRAINED.items():
        for use, codes in (("read", (0, 2)), ("require", (2,))):
            yield Case(f"cache: trained on {name}, {use}", _trained(change, use), codes=codes)


def _origin(path: str) -> Callable[[Path], None]:
    return unit.of_origin("path", path)


_ORIGINS: dict[str, Callable[[Path], None]] = {
    "origin at our server": _origin("http://127.0.0.1:{port}/steal"),
    "origin in a chain": _origin("simplecache::http://127.0.0.1:{port}/steal"),
    "origin at another protocol": _origin("ftp://127.0.0.1:{port}/steal"),
    "origin is the secret": _origin("{secret}"),
    "origin is random": _origin("/dev/urandom"),
    "origin is a process": _origin("/proc/self/mem"),
}


def _looked_at(change: Callable[[Path], None], look: list[str]) -> Callable[[Field], list[str]]:
    def make(field: Field) -> list[str]:
        root, clip = field.inside / "cache", field.inside / "clip.mp4"
        clip.write_bytes(b"a clip")
        origin = Origin(str(clip), clip.stat().st_size, clip.stat().st_mtime_ns, "sha")
        writer = ShardWriter(root)
        writer.add("clip", tensors_of(1)["clip"], EntryInfo("clip", "clip", "vae", origin))
        writer.publish()
        (root / "files").mkdir()
        (shard,) = (root / FOLDER).glob("*.safetensors")
        change(shard)
        _fill_in(shard, field)
        return ["cache", *look, "--cache-dir", "cache"]

    return make


def _fill_in(shard: Path, field: Field) -> None:
    """Writes the port and the path of the secret into origins that name them."""

    def change(header: dict[str, object], entries: dict[str, dict[str, dict[str, object]]]) -> None:
        path = str(entries["clip"]["origin"]["path"])
        filled = path.replace("{port}", str(field.port)).replace("{secret}", str(field.secret))
        entries["clip"]["origin"]["path"] = filled

    if shard.is_file() and shard.stat().st_size < 1_000_000:
        try:
            unit.rewrite(shard, change)
        except (ValueError, LookupError, TypeError, RecursionError, struct.error):
            return  # broken as a whole: nothing to fill in


_FOLDERS: dict[str, Callable[[Field, Path], object]] = {
    "the folder of shards is a file": lambda field, root: (root / FOLDER).write_bytes(b""),
    "the folder of shards leads outside": lambda field, root: (root / FOLDER).symlink_to(field.outside),
    "the folder of shards leads to itself": lambda field, root: (root / FOLDER).symlink_to(FOLDER),
    "a shard is a link to a file outside": lambda field, root: _shard_link(root, field.victim),
    "a shard is a link to a device": lambda field, root: _shard_link(root, Path("/dev/zero")),
    "the book leads outside": lambda field, root: (root / "files").symlink_to(field.outside),
}


def _shard_link(root: Path, to: Path) -> None:
    (root / FOLDER).mkdir()
    (root / FOLDER / "0.safetensors").symlink_to(to)


def _folder(change: Callable[[Field, Path], object], look: list[str]) -> Callable[[Field], list[str]]:
    def make(field: Field) -> list[str]:
        (field.inside / "cache").mkdir()
        change(field, field.inside / "cache")
        return ["cache", *look, "--cache-dir", "cache"]

    return make


@cache
def _real_cache() -> Path:
    """Returns a folder with a set and its cache; made once."""
    root = Path(tempfile.mkdtemp(prefix="hostile-cache-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    good_set(root / "set")
    done = run_sat_train([*PRECOMPUTE, *_WINDOW], cwd=root)
    assert done.returncode == 0, done.output
    return root


def _zeros(shard: Path) -> None:
    data = shard.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    shard.write_bytes(data[:begin] + bytes(len(data) - begin))


_TRAINED: dict[str, Callable[[Path], object]] = {
    "zeros": _zeros,
    "nothing": lambda shard: shard.write_bytes(b""),
    "a FIFO": unit.fifo,
    "a folder": unit.folder,
    "20 GB": unit.sparse,
    "brackets": unit.framed(b"[" * 100_000),
    "a device": lambda shard: (shard.unlink(), shard.symlink_to("/dev/zero")),
}


def _trained(change: Callable[[Path], object], use: str) -> Callable[[Field], list[str]]:
    def make(field: Field) -> list[str]:
        for name in ("set", "cache"):
            shutil.copytree(_real_cache() / name, field.inside / name)
        for shard in list((field.inside / "cache" / FOLDER).glob("*.safetensors")):
            change(shard)
        return [*TRAIN, *_WINDOW, "data.cache_dir=cache", f"data.cache={use}"]

    return make

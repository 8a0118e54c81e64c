"""Host memory that a process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 2**60  # what cgroups write for no limit lies above


def spare_host_memory() -> int:
    """Returns the bytes that this machine and the limits of this process (cgroups) still give; 0 if unknown.

    Files that the system only caches count as free.
    """
    rooms = [*_room_of_machine(), *_rooms_of_groups()]
    return max(min(rooms), 0) if rooms else 0


def _room_of_machine() -> Iterator[int]:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])


def _rooms_of_groups() -> Iterator[int]:
    """Yields the room in each group of this process, of version 1 (`memory` in the name) or 2 (no name)."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            yield from _rooms(Path("/sys/fs/cgroup"), place, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            yield from _rooms(Path("/sys/fs/cgroup/memory"), place, *names)


def _rooms(root: Path, place: str, limit: str, used: str, prefix: str) -> Iterator[int]:
    folder = root / place.strip("/")
    for group in (folder, *folder.parents):
        most, taken = _number(group / limit), _number(group / used)
        if most is not None and taken is not None and most < _NO_LIMIT:
            yield most - taken + _cached(group, prefix)
        if group == root:
            return


def _cached(group: Path, prefix: str) -> int:
    kinds = (f"{prefix}inactive_file", f"{prefix}active_file")
    fields = (line.split() for line in _lines(group / "memory.stat"))
    return sum(int(each[1]) for each in fields if each and each[0] in kinds)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []

"""Checks, their findings, and the runner: one that fails or runs out of memory does not end the others."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sat_train.config.hardware import Hardware, cards_named
from sat_train.distributed.processes import ProcessMesh
from sat_train.models.meters import LivingTensors

_GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What every check is told.

    Args:
        mesh: The process mesh.
        card: Rates and memory that predictions assume.
        tiny: The embedded model in place of the released sizes.
        folder: For what checks write.
    """

    mesh: ProcessMesh
    card: Hardware
    tiny: bool
    folder: Path

    @property
    def on_gpu(self) -> bool:
        """True where times and memory of a device can be measured."""
        return self.mesh.device.type == "cuda"

    def wait(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.mesh.device)


@dataclass(frozen=True)
class Finding:
    """One measured value next to its prediction.

    Args:
        what: What was measured, with its unit.
        measured: The value.
        predicted: What was expected; empty where nothing was.
        passed: Whether they agree; None where the value is for the reader.
    """

    what: str
    measured: float | str
    predicted: float | str = ""
    passed: bool | None = None

    def line(self) -> str:
        """Returns the finding as a line of the table."""
        verdict = {True: "PASS", False: "FAIL", None: ""}[self.passed]
        return f"  {verdict:<5}{self.what:<44}{_shown(self.measured):>20}{_shown(self.predicted):>26}"


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


@dataclass(frozen=True)
class Check:
    """Something that only a machine can show.

    Args:
        name: As `--only` spells it.
        minutes: What it takes on one H100, about.
        meaning: What it is for.
        run: Yields findings as soon as they are known.
        on_cpu: `--tiny` can run it without a GPU.
    """

    name: str
    minutes: float
    meaning: str
    run: Callable[[Setting], Iterator[Finding]]
    on_cpu: bool = True


def within(what: str, measured: float, predicted: float, *, least: float, most: float) -> Finding:
    """Returns a finding that passes between two shares of the predicted value."""
    passed = least * predicted <= measured <= most * predicted
    bounds = f"{predicted:.4g}, x {least:g} to {most:g}"
    return Finding(what, measured, bounds, passed)


def at_most(what: str, measured: float, limit: float) -> Finding:
    """Returns a finding that passes up to a limit."""
    return Finding(what, measured, f"<= {limit:.4g}", measured <= limit)


def relative_error(found: Sequence[float], expected: Sequence[float]) -> float:
    """Returns the largest error of values, relative to those that are expected."""
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def recognized(device_name: str, memory_gib: float) -> Hardware | None:
    """Returns the card of the planner's table with this name, and the memory that is nearest."""
    cards = cards_named(device_name)
    return min(cards, key=lambda card: abs(card.memory_gib - memory_gib), default=None)


def peak_of(setting: Setting, module: nn.Module, run: Callable[[], object]) -> float:
    """Returns the bytes that a call takes at most besides what was there before.

    Args:
        setting: Where it runs.
        module: Its weights were there before.
        run: The call.
    """
    if not setting.on_gpu:
        with LivingTensors(module) as living:
            run()
        return living.peak
    release()
    before = torch.cuda.memory_allocated(setting.mesh.device)
    torch.cuda.reset_peak_memory_stats(setting.mesh.device)
    run()
    setting.wait()
    return torch.cuda.max_memory_allocated(setting.mesh.device) - before


def kept_bytes(run: Callable[[], object], *, shared: Sequence[Tensor] = ()) -> int:
    """Returns the bytes that a forward keeps for its backward, without weights.

    Args:
        run: The forward.
        shared: Tensors that are not counted, such as tables of all blocks.
    """
    left_out = {tensor.untyped_storage()._cdata for tensor in shared}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if not is_weight and tensor.untyped_storage()._cdata not in left_out:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def seconds_of(setting: Setting, run: Callable[[], object], *, repeats: int = 1) -> float:
    """Returns the shortest of several times of a call, the device's work included."""
    times = []
    for _ in range(repeats):
        setting.wait()
        start = time.perf_counter()
        run()
        setting.wait()
        times.append(time.perf_counter() - start)
    return min(times)


def release() -> None:
    """Gives back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def carry_out(check: Check, setting: Setting, out: Path | None) -> bool:
    """Runs one check; prints its findings and appends them to a file on rank 0.

    Returns:
        Whether nothing has failed.

    Ranks: all.
    """
    tell = setting.mesh.rank == 0
    if tell:
        print(f"{check.name}: {check.meaning}", flush=True)
    passed, start = True, time.perf_counter()
    for finding in _findings(check, setting):
        passed = passed and finding.passed is not False
        if tell:
            print(finding.line(), flush=True)
            write_line(out, check.name, finding, seconds=time.perf_counter() - start)
    release()
    return passed


def _findings(check: Check, setting: Setting) -> Iterator[Finding]:
    try:
        yield from check.run(setting)
    except Exception as error:  # whatever ends a check is its result
        first_line = (str(error).splitlines() or [""])[0]
        yield Finding(f"ended: {type(error).__name__}", first_line, passed=False)


def write_line(out: Path | None, name: str, finding: Finding, *, seconds: float) -> None:
    """Appends a finding to the file, with what it was measured on."""
    if out is None:
        return
    has_gpu = torch.cuda.is_available()
    line = {
        "check": name,
        **asdict(finding),
        "seconds": round(seconds, 3),
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "torch": torch.__version__,
    }
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def listed(checks: Sequence[Check]) -> str:
    """Returns a table of checks."""
    rows = [f"  {check.name:<24}{check.minutes:>5g} min  {check.meaning}" for check in checks]
    return "\n".join(rows)

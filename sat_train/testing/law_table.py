"""Tries the laws of parts on an extension."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sat_train.testing import network_laws, run_laws
from sat_train.testing.drawn_clips import Shapes
from sat_train.testing.pool import RankPool
from sat_train.testing.run_laws import TrainedRuns
from sat_train.testing.trial import ExtensionTrial, LawBroken, NotApplicable

# By the names that `laws` selects; cheap ones first.
_IN_PROCESS: dict[str, Callable[[ExtensionTrial], str]] = {
    "typos": network_laws.typos_are_refused,
    "base": network_laws.it_begins_as_the_base,
    "gradients": network_laws.every_weight_gets_a_gradient,
    "batch": network_laws.the_batch_comes_first,
    "drop": network_laws.dropping_concerns_its_own_rows,
    "order": network_laws.order_decides_nothing,
    "shapes": network_laws.shapes_do_not_interfere,
    "recompute": network_laws.recomputing_changes_nothing,
    "compile": network_laws.blocks_compile_once,
}
_ON_RANKS: dict[str, Callable[[ExtensionTrial, TrainedRuns], str]] = {
    "resume": run_laws.a_resumed_run_is_the_same_run,
    "export": run_laws.exported_modules_are_the_same,
    "cache": run_laws.the_cache_changes_no_loss,
    "zero": run_laws.zero_stages_agree,
    "tensor_parallel": run_laws.tensor_parallelism_agrees,
}
LAWS = (*_IN_PROCESS, *_ON_RANKS)


@dataclass(frozen=True)
class LawResult:
    """The outcome of a law.

    Args:
        law: Its name.
        outcome: `holds`, `broken`, or `left out` where it does not apply.
        detail: What was tried, the culprit, or why it does not apply.
        seconds: Its duration.
    """

    law: str
    outcome: Literal["holds", "broken", "left out"]
    detail: str
    seconds: float


@dataclass(frozen=True)
class LawReport:
    """The results of all laws; its text is a table.

    Args:
        extension: The extension.
        results: One for each law, in order.
    """

    extension: str
    results: tuple[LawResult, ...]

    @property
    def broken(self) -> tuple[LawResult, ...]:
        """The laws that do not hold."""
        return tuple(each for each in self.results if each.outcome == "broken")

    def __str__(self) -> str:
        width = max(len(each.law) for each in self.results)
        lines = [
            f"{each.law:{width}}  {each.outcome:8}  {each.seconds:5.1f} s  {each.detail}"
            for each in self.results
        ]
        return "\n".join([f"laws of {self.extension}", *lines])


class BrokenLaws(AssertionError):
    """At least one law is broken; the message is the table.

    Args:
        report: All results.
    """

    def __init__(self, report: LawReport) -> None:
        self.report = report
        super().__init__(str(report))


def check_extension(
    path: str | Path,
    *files_and_words: str | Path,
    laws: Sequence[str] | None = None,
    field_shapes: Shapes | None = None,
    ranks: RankPool | None = None,
) -> LawReport:
    """Tries the laws that hold for every part on an extension with a tiny model, on the CPU.

    Args:
        path: File, folder or package of the extension.
        files_and_words: YAML files that use it, and `key=value` words of a command line. The samples are a
            few drawn clips with their fields, unless a word is `args.train_data=...`.
        laws: Names among `LAWS`; None tries all.
        field_shapes: For drawn samples, by the field's name, the shape of a frame of a `per_frame` field, or
            of an `array`; by default that of cameras and points, and 8 numbers.
        ranks: Living processes for the laws that train on two ranks; None starts them, and ends them.

    Returns:
        The results, all of which hold or do not apply; print it for a table.

    Raises:
        BrokenLaws: A law is broken; the table names the culprit.
        ValueError: There is no such law.
        ConfigError: The extension or the YAML files cannot be read.
    """
    chosen = list(LAWS) if laws is None else list(laws)
    if unknown := sorted(set(chosen) - set(LAWS)):
        raise ValueError(f"there is no law {', '.join(unknown)}, but {', '.join(LAWS)}")
    words = [str(word) for word in files_and_words]
    files = tuple(word for word in words if "=" not in word)
    rest = tuple(word for word in words if "=" in word)
    with tempfile.TemporaryDirectory(prefix="sat-train-laws-") as folder:
        trial = ExtensionTrial(str(path), files, rest, Path(folder), field_shapes or {})
        _ = trial.parts  # while the extension is registered
        pool = ranks or RankPool()
        try:
            runs = TrainedRuns(trial, pool)
            report = LawReport(str(path), tuple(_try(name, trial, runs) for name in chosen))
        finally:
            if ranks is None:
                pool.close()
    if report.broken:
        raise BrokenLaws(report)
    return report


def _try(name: str, trial: ExtensionTrial, runs: TrainedRuns) -> LawResult:
    start = time.monotonic()
    outcome: Literal["holds", "broken", "left out"] = "holds"
    try:
        detail = _IN_PROCESS[name](trial) if name in _IN_PROCESS else _ON_RANKS[name](trial, runs)
    except NotApplicable as reason:
        outcome, detail = "left out", str(reason)
    except LawBroken as broken:
        outcome, detail = "broken", str(broken)
    except Exception as error:  # of the extension's own code
        outcome, detail = "broken", f"{type(error).__name__}: {error}{_place(error)}"
    return LawResult(name, outcome, detail, time.monotonic() - start)


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({frame.filename}:{frame.lineno})"

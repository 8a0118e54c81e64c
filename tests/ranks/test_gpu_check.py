"""`benchmarks/gpu_check.py` on a CPU: every check that can run there, on the embedded model."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import chosen, one_gpu, run_here, several_gpus
from benchmarks.gpu_parts.check import Check, Finding, Setting, recognized
from sat_train.config.hardware import HARDWARE, find_hardware
from sat_train.distributed.processes import ProcessMesh, start_single_process
from sat_train.errors import LaunchError

H100 = find_hardware("h100")


def _failing(setting: Setting) -> Iterator[Finding]:
    yield Finding("before", 1.0)
    raise MemoryError("no more\nlines")


def test_the_checks_of_one_gpu_run_on_a_cpu_and_one_that_fails_ends_no_other(tmp_path: Path) -> None:
    out = tmp_path / "findings.jsonl"
    checks = [Check("failing", 0, "fails", _failing), *one_gpu()]
    setting = Setting(start_single_process(), H100, True, tmp_path)
    assert run_here(checks, setting, out) == ["failing"], _failures(tmp_path)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["check"] for line in lines[:2]] == ["failing", "failing"]
    assert lines[1]["what"] == "ended: MemoryError"
    assert lines[1]["measured"] == "no more"
    assert {line["check"] for line in lines} == {check.name for check in checks if check.on_cpu}


@pytest.mark.parametrize(
    ("only", "minutes", "expected"),
    [(["nothing"], None, "no check nothing"), (None, 1e-6, "no check is so short")],
)
def test_checks_of_which_none_runs_are_no_pass(
    only: list[str] | None, minutes: float | None, expected: str
) -> None:
    with pytest.raises(LaunchError, match=expected):
        chosen(one_gpu(), Namespace(only=only, minutes=minutes))


def _several(mesh: ProcessMesh, folder: Path, names: list[str]) -> list[str]:
    checks = [check for check in several_gpus() if not names or check.name in names]
    return run_here(checks, Setting(mesh, H100, True, folder), folder / "findings.jsonl")


def _failures(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "findings.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["passed"] is False]


@pytest.mark.ranks
def test_the_checks_of_several_gpus_run_on_two_cpus_and_resume_on_one(
    rank_pool: Callable[..., Any], tmp_path: Path
) -> None:
    assert rank_pool(2)(_several, tmp_path, []) == [[], []], _failures(tmp_path)
    assert rank_pool(1)(_several, tmp_path, ["resume_here"]) == [[]], _failures(tmp_path)


def test_cards_are_recognized_by_name_and_memory() -> None:
    names = {
        "h100": "NVIDIA H100 80GB HBM3",
        "a100": "NVIDIA A100-SXM4-80GB",
        "a100-40": "NVIDIA A100-PCIE-40GB",
    }
    names |= {"rtx4090": "NVIDIA GeForce RTX 4090", "h200": "NVIDIA H200", "l40s": "NVIDIA L40S"}
    for name, spelled in names.items():
        assert recognized(spelled, 0.98 * HARDWARE[name].memory_gib) == HARDWARE[name]
    assert recognized("NVIDIA A10G", 22) is None

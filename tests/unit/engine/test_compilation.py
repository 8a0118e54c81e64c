"""What `args.compile=auto` decides, and why."""

from __future__ import annotations

import pytest
import torch

from sat_train.config import ArgsConfig
from sat_train.engine.compilation import compiles_blocks, reason_for_eager, reason_without_c


@pytest.mark.parametrize(
    ("zero_stage", "capability", "reason"),
    [(1, None, "on GPUs alone"), (3, (9, 0), "ZeRO-3"), (2, (6, 1), "capability 7.0")],
)
def test_auto_says_why_blocks_stay_eager(
    zero_stage: int, capability: tuple[int, int] | None, reason: str
) -> None:
    assert reason in reason_for_eager(zero_stage, capability)


def test_without_a_c_compiler_blocks_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert "C compiler" in reason_without_c()


def test_a_cpu_compiles_only_when_told_to() -> None:
    compiled = [compiles_blocks(ArgsConfig(compile=choice), torch.device("cpu")) for choice in CHOICES]
    assert compiled == [False, False, True]


CHOICES = ("auto", "off", "blocks")

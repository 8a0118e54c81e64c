"""Planned seconds of steps next to those that an H100 80GB HBM3 took with torch 2.11 (docs/benchmarks.md)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sat_train.config import load_run_config
from sat_train.config.hardware import find_hardware
from sat_train.distributed.processes import start_single_process, stop_processes
from sat_train.planning.planner import Planner

# model, recipe, args.compile, args.checkpoint_activations; one sample of 49 x 480 x 720, a complete cache
MEASURED_S = {
    ("2b", "sft", "blocks", "off"): 0.983,
    ("5b", "lora", "blocks", "off"): 2.133,
    ("5b", "lora", "blocks", "attention"): 2.366,
    ("5b", "lora", "blocks", "full"): 2.742,
    ("5b", "lora", "off", "full"): 3.173,
}
CLOSE = 0.1
CACHED = ("data.cache=require", "data.cache_dir=cache", "args.batch_size=1", "args.device=cuda")


@pytest.fixture(scope="module")
def planner() -> Iterator[Planner]:
    start_single_process()
    yield Planner(find_hardware("h100"), gpus=1)
    stop_processes()


@pytest.mark.parametrize("run", MEASURED_S, ids="-".join)
def test_a_planned_step_is_near_the_measured_one(planner: Planner, run: tuple[str, ...]) -> None:
    model, recipe, compiled, recomputed = run
    files = [f"configs/model/cogvideox_{model}.yaml", f"configs/{recipe}.yaml"]
    words = (*CACHED, f"args.compile={compiled}", f"args.checkpoint_activations={recomputed}")
    config = load_run_config(files, words, purpose="check", check_paths=False)
    assert planner.step_time(config).total == pytest.approx(MEASURED_S[run], rel=CLOSE)

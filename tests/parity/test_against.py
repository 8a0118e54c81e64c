"""`benchmarks/against.py`: contenders with the same weights compute the same, and ours keeps less."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.against import TINY, compare, draw_inputs, of_diffusers, ours, table
from benchmarks.gpu_parts.check import Setting
from sat_train.config import load_run_config
from sat_train.config.hardware import find_hardware
from sat_train.distributed.processes import start_single_process


def test_a_step_of_diffusers_model_has_the_same_output_and_keeps_more(tmp_path: Path) -> None:
    words = ["data.params.max_num_frames=5", "model.network_config.params.num_layers=2"]
    config = load_run_config([str(TINY)], words, purpose="check", check_paths=False)
    like = {"device": torch.device("cpu"), "dtype": torch.float32}
    setting = Setting(start_single_process(), find_hardware("h100"), True, tmp_path)
    first = ours(config, **like, compiled=False)
    contenders = [first, of_diffusers(config, first.module, like)]
    rows = compare(contenders, draw_inputs(config, 1, like), setting, rounds=1)
    assert rows[1].error < 1e-5  # sums in another order
    assert rows[0].kept < rows[1].kept
    assert "diffusers" in table(rows)

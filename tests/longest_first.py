"""Order in which two workers take the test files: the longest first, so that they end together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

# Seconds of the long files, on a machine that is busy with other things: only their order counts.
# `pytest --durations=1` prints such lines at its end.
SECONDS: dict[str, int] = {
    "slurm/test_train_sbatch.py": 140,
    "ranks/test_whole_runs.py": 100,
    "runs/test_newcomer.py": 82,
    "runs/test_faults.py": 75,
    "ranks/test_blocks_in_deepspeed.py": 75,
    "runs/test_lost_ranks.py": 70,
    "ranks/test_any_to_any.py": 54,
    "ranks/test_gpu_check.py": 53,
    "ranks/test_extension_laws.py": 48,
    "runs/test_cache.py": 48,
    "runs/test_readme.py": 46,
    "ranks/test_checkpoint.py": 45,
    "unit/data/test_paces.py": 45,
    "ranks/test_extensions.py": 44,
    "ranks/test_training_steps.py": 42,
    "runs/test_train.py": 39,
    "ranks/test_validation.py": 38,
    "unit/testing/test_network_laws.py": 38,
    "ranks/test_lora_runs.py": 36,
    "ranks/test_plan.py": 36,
    "runs/test_kill.py": 35,
    "ranks/test_tensor_parallel.py": 34,
    "examples/test_examples.py": 33,
    "ranks/test_bucket_runs.py": 32,
    "unit/planning/test_plan.py": 30,
    "ranks/test_conditions.py": 30,
    "runs/test_footage.py": 29,
    "ranks/test_optimizers.py": 28,
    "runs/test_sample.py": 27,
    "unit/test_hardware_lines.py": 26,
    "ranks/test_export.py": 25,
    "ranks/test_condition_report.py": 25,
    "unit/data/test_loader.py": 24,
    "unit/planning/test_families.py": 23,
    "ranks/test_branch_runs.py": 23,
    "unit/data/test_corpus.py": 22,
    "ranks/test_diffusers_recipes.py": 22,
    "ranks/test_loss_term_runs.py": 21,
    "unit/models/test_stack.py": 20,
    "unit/cli/test_new_extension.py": 19,
    "hostile/test_corpus.py": 19,
    "ranks/test_work_queue.py": 18,
    "runs/test_expected_curve.py": 18,
    "unit/checkpoint/test_lora_files.py": 18,
    "parity/test_sampling_run.py": 18,
    "ranks/test_trainer.py": 18,
    "unit/data/test_clip_pool.py": 17,
    "unit/models/test_recompute_budget.py": 16,
    "runs/test_extend_page.py": 16,
    "unit/models/test_mixins.py": 15,
    "unit/cli/test_convert.py": 15,
    "runs/test_data_page.py": 15,
    "parity/test_lora_export.py": 15,
    "unit/models/test_dit.py": 14,
    "unit/cli/test_stopped_early.py": 14,
    "unit/models/test_tiny_vae.py": 14,
    "parity/test_snippet.py": 13,
    "unit/config/test_model_spec.py": 13,
    "unit/models/test_control_branch.py": 13,
    "unit/encoding/cache/test_hostile.py": 13,
    "unit/config/test_guard_rails.py": 12,
    "unit/models/test_lora.py": 12,
}
# Short files stand before the last of these, and so does a long one that has no number yet.
_UNKNOWN = 30


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/")


def sort_by_file(items: list[pytest.Item], seconds: Mapping[str, int] = SECONDS) -> None:
    """Sorts in place: files by their seconds; the tests of a file stay in order."""
    items.sort(key=lambda item: -seconds.get(file_of(item.nodeid), _UNKNOWN))


def table_of(reports: Sequence[pytest.TestReport], *, least: int = 8) -> list[str]:
    """Returns the lines of `SECONDS` for what has just run."""
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds[file_of(report.nodeid)] += report.duration
    return [f'    "{name}": {total:.0f},' for name, total in seconds.most_common() if total >= least]

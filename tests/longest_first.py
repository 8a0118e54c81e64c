"""Order in which two workers take the test files: the longest first, so that they end together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

# Seconds of the long files, on a machine that is busy with other things: only their order counts.
# `pytest --durations=1` prints such lines at its end.
SECONDS: dict[str, int] = {
    "slurm/test_train_sbatch.py": 155,
    "ranks/test_whole_runs.py": 119,
    "runs/test_faults.py": 80,
    "runs/test_lost_ranks.py": 79,
    "runs/test_newcomer.py": 77,
    "ranks/test_blocks_in_deepspeed.py": 69,
    "ranks/test_any_to_any.py": 55,
    "ranks/test_plan.py": 52,
    "ranks/test_gpu_check.py": 51,
    "runs/test_readme.py": 49,
    "ranks/test_checkpoint.py": 48,
    "ranks/test_extension_laws.py": 46,
    "runs/test_train.py": 46,
    "unit/data/test_paces.py": 45,
    "runs/test_cache.py": 45,
    "unit/testing/test_network_laws.py": 43,
    "ranks/test_validation.py": 40,
    "ranks/test_extensions.py": 39,
    "ranks/test_optimizers.py": 34,
    "ranks/test_tensor_parallel.py": 30,
    "examples/test_examples.py": 30,
    "unit/test_hardware_lines.py": 29,
    "unit/planning/test_plan.py": 28,
    "unit/data/test_loader.py": 27,
    "ranks/test_bucket_runs.py": 25,
    "ranks/test_condition_report.py": 25,
    "ranks/test_lora_runs.py": 24,
    "ranks/test_export.py": 24,
    "runs/test_kill.py": 23,
    "unit/planning/test_families.py": 23,
    "ranks/test_conditions.py": 23,
    "runs/test_footage.py": 22,
    "ranks/test_training_steps.py": 20,
    "unit/data/test_corpus.py": 20,
    "ranks/test_branch_runs.py": 20,
    "ranks/test_diffusers_recipes.py": 19,
    "ranks/test_work_queue.py": 18,
    "hostile/test_corpus.py": 18,
    "unit/config/test_model_spec.py": 17,
    "parity/test_sampling_run.py": 16,
    "unit/models/test_lora.py": 16,
    "unit/checkpoint/test_lora_files.py": 16,
    "unit/planning/test_measured_steps.py": 15,
    "ranks/test_loss_term_runs.py": 15,
    "unit/models/test_stack.py": 15,
    "unit/models/test_recompute_budget.py": 15,
    "unit/data/test_clip_pool.py": 15,
    "runs/test_data_page.py": 14,
    "runs/test_extend_page.py": 14,
    "parity/test_snippet.py": 14,
    "ranks/test_trainer.py": 14,
    "unit/models/test_mixins.py": 14,
    "unit/cli/test_stopped_early.py": 14,
    "unit/cli/test_new_extension.py": 14,
    "parity/test_lora_export.py": 14,
    "runs/test_launch_scripts.py": 13,
    "runs/test_expected_curve.py": 12,
    "rules/test_house_rules.py": 12,
    "unit/models/test_dit.py": 12,
    "unit/checkpoint/test_hostile_weights.py": 11,
    "unit/config/test_guard_rails.py": 11,
    "unit/models/test_control_branch.py": 11,
    "unit/encoding/cache/test_hostile.py": 11,
    "unit/config/test_every_key.py": 10,
    "runs/test_sample.py": 10,
    "unit/planning/test_counting.py": 10,
    "unit/planning/test_activations.py": 10,
    "unit/data/test_sampler.py": 10,
    "unit/cli/test_convert.py": 10,
    "parity/test_round_trip.py": 10,
    "unit/data/test_window_cost.py": 9,
    "unit/encoding/conditions/test_cached.py": 9,
    "unit/training/test_run_directory.py": 9,
    "ranks/test_gradient_check.py": 9,
    "unit/models/test_tiny_vae.py": 9,
    "unit/distributed/test_signals.py": 9,
    "unit/data/test_buckets.py": 8,
    "parity/test_vae_diffusers.py": 8,
    "unit/data/sources/test_remote_archives.py": 8,
    "unit/data/test_dataset.py": 8,
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

"""What the conditions of held-out clips are worth: the same at any number of ranks and with a cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat_train.distributed.processes import stop_processes
from sat_train.training.callbacks.metrics_file import read_metrics
from tests.ranks.extensions import write_extensions
from tests.ranks.micro import logged_micro, run_directory, write_micro

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("condition_report")
    write_micro(path)
    write_extensions(path)
    stop_processes()
    return path


def train(rank_pool, folder: Path, name: str, *words: str, ranks: int = 1) -> tuple[list[str], dict]:
    """Trains with the brightness of the clips as a condition; returns the log and the reports by step."""
    shape = [f"args.experiment_name={name}", "args.lr=1e-2", "args.warmup=0", f"args.batch_size={4 // ranks}"]
    condition = ["--extension", str(folder / "brightness"), "model.conditions.brightness.target=Brightness"]
    validation = [
        "args.eval_interval=2",
        "args.eval_batch_size=1",
        "args.eval_iters=7",
        "args.eval_timesteps=2",
    ]
    run = [*condition, *shape, *validation, "args.train_iters=2", "args.save_interval=2", *words]
    lines = rank_pool(ranks)(logged_micro, folder, run)[0]
    path = run_directory(folder, name)
    records = [record for record in read_metrics(path / "metrics.jsonl") if "conditions" in record]
    return lines, {record["step"]: record["conditions"] for record in records}


MODULE = "model.modules.brightness.target=BrightnessFeatures"


def test_a_used_condition_is_told_from_one_that_nothing_reads(rank_pool, folder):
    warned = "args.condition_report.warn_after=2"
    lines, used = train(rank_pool, folder, "used", MODULE, warned)
    mean, low, high = used[2]["brightness"]["true_minus_shuffled"]
    assert used[0]["brightness"]["true_minus_shuffled"] == [0, 0, 0], "a module that begins at zero"
    assert low <= mean <= high
    assert mean, "two steps later it matters whose brightness it is"
    assert any("brightness: true minus another clip's" in line for line in lines)
    lines, unused = train(rank_pool, folder, "unused", warned)
    assert unused[2]["brightness"]["true_minus_shuffled"] == [0, 0, 0]
    assert sum("step 2: the condition brightness is not used" in line for line in lines) == 1


def test_the_report_does_not_depend_on_ranks_batches_zero_stage_or_cache(rank_pool, folder):
    _, one = train(rank_pool, folder, "one", MODULE)
    _, three = train(rank_pool, folder, "stage3", MODULE, "args.zero_stage=3", ranks=2)
    cache = [f"data.cache_dir={folder}/cache", "args.eval_batch_size=2", "args.eval_iters=4"]
    train(rank_pool, folder, "filled", MODULE, "data.cache=fill", *cache)
    _, cached = train(rank_pool, folder, "cached", MODULE, "data.cache=require", *cache)
    reports = [each[2]["brightness"] for each in (one, three)]
    for kind in ("true_minus_shuffled", "true_minus_dropped"):
        assert reports[1][kind] == pytest.approx(reports[0][kind], abs=1e-6), "losses of 2.5 in fp32"
    _, uncached = train(rank_pool, folder, "uncached", MODULE, *cache[1:])
    assert cached[2] == uncached[2], "bit for bit"


_VIEW = '''
"""How far the prediction is from the target, and a picture of it."""

from sat_train.parts import Field, ViewParams, part


@part("view", "Distance", build=".view:Distance")
class DistanceParams(ViewParams):
    """Mean of the absolute error of v."""

    scale: float = Field(1.0, gt=0, description="Factor on the error.")
'''
_VIEW_IN_TORCH = """
from sat_train.extend import ValidationView


class Distance(ValidationView):
    def numbers(self, step):
        error = (step.v_pred_btchw - step.v_true_btchw).abs()
        return {"error": self.params.scale * error.flatten(1).mean(dim=1)}

    def pictures(self, step):
        return {"decoded": ((step.decode(step.x0_pred()).clamp(-1, 1) + 1) * 127.5).byte()}
"""


def test_a_view_from_outside_reports_numbers_with_intervals_and_writes_pictures(rank_pool, folder):
    (folder / "distance").mkdir()
    (folder / "distance/__init__.py").write_text(_VIEW)
    (folder / "distance/view.py").write_text(_VIEW_IN_TORCH)
    view = ["args.validation_views.near={target: Distance, clips: 1, params: {scale: 2}}"]
    train(rank_pool, folder, "viewed", MODULE, "--extension", str(folder / "distance"), *view, ranks=2)
    (run,) = (folder / "runs").glob("viewed-*")
    record = read_metrics(run / "metrics.jsonl")[0]
    view = record["views"]["near/error"]
    low, high = view["interval"]
    assert 0 < low < view["mean"] < high
    assert view["mean"] > 1.5 * record["valid_loss"] ** 0.5, (
        "twice the mean, which is near the root of squares"
    )
    assert (run / "samples/000000/view_near.png").is_file()

"""Runs with control branches, and with a wider input: the base's first loss, the same on every mesh."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest

from sat_train.checkpoint.fragments import read_fragments
from sat_train.checkpoint.manifest import read_manifest
from sat_train.distributed.processes import stop_processes
from sat_train.training.callbacks.metrics_file import read_metrics
from tests.ranks.micro import logged_micro, run_directory, train_micro, write_micro

pytestmark = pytest.mark.ranks

_EXTENSION = '''
"""The clip's own latent as a condition."""

from sat_train.parts import ConditionParams, Field, part


@part("condition", "Mirror", build=":build")
class MirrorParams(ConditionParams):
    """The mean of the clip's latent."""

    wide: bool = Field(False, description="Next to the latent, and not for a module.")

    def channels(self, model):
        return model.out_channels * self.wide

    def width(self, model):
        return model.out_channels


def build(params, model):
    from sat_train.extend import Condition, DitInputs

    class Mirror(Condition):
        tensors = frozenset({"mean"})

        def encode(self, sample, encoders):
            return {"mean": encoders.video(sample.video_tchw, subject="a clip")["mean"]}

        def inputs(self, encoded, random, latent_shape):
            if params.wide:
                return DitInputs(channels_btchw=encoded["mean"])
            return DitInputs(extras={self.name: encoded["mean"]})

    return Mirror()
'''
STEPS = ("args.train_iters=3", "args.lr=1e-2", "args.lr_decay_style=constant", "args.warmup=0")
BRANCH = (
    "model.conditions.control.target=Mirror",
    "model.modules.control.target=ControlBranch",
    "model.modules.control.params={blocks: 1}",
    "data.fields.clip={kind: video, column: videos}",  # the clip as its own control
    "model.conditions.pixels={target: ControlPixels, params: {field: clip}}",
    "model.modules.pixels={target: PixelControlBranch, params: {condition: pixels, blocks: 1, weight: 0.1}}",
)
WIDE = ("model.conditions.control.target=Mirror", "model.conditions.control.params.wide=true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds a model that two ranks of the model axis can share."""
    path = tmp_path_factory.mktemp("branch")
    write_micro(path, heads=2)
    (path / "mirror.py").write_text(_EXTENSION)
    stop_processes()
    return path


def words(folder: Path, name: str, *more: str) -> list[str]:
    extension = ["--extension", str(folder / "mirror.py")] if more else []
    return [*extension, f"args.experiment_name={name}", *STEPS, *more]


def losses(folder: Path, name: str) -> list[float]:
    return [record["loss"] for record in read_metrics(run_directory(folder, name) / "metrics.jsonl")]


@pytest.fixture(scope="module")
def base_loss(rank_pool, folder) -> float:
    rank_pool(1)(train_micro, folder, words(folder, "base"))
    return losses(folder, "base")[0]


def test_branches_begin_at_the_base_s_loss_and_train_alike_on_every_mesh(rank_pool, folder, base_loss):
    lines = "\n".join(rank_pool(1)(logged_micro, folder, words(folder, "branch", *BRANCH))[0])
    assert "checked on the first sample: the model starts as its base" in lines
    assert "The base is frozen, because there are modules" in lines
    expected = losses(folder, "branch")
    assert expected[0] == base_loss
    assert expected[2] < 0.99 * expected[0]
    layouts = {
        "zero3": (2, "args.batch_size=1", "args.zero_stage=3"),
        "tp": (2, "args.model_parallel_size=2"),
    }
    for name, (ranks, *more) in layouts.items():
        size = 2 if name == "tp" else 1
        own = words(folder, name, *BRANCH, *more)
        rank_pool(ranks)(train_micro, folder, own, model_parallel_size=size)
        assert losses(folder, name) == pytest.approx(expected, rel=1e-4), name  # fp32, sums in another order
    step = run_directory(folder, "branch") / "3"
    assert all(
        name.startswith(("mixins.control.", "mixins.pixels."))
        for name in read_fragments(step, read_manifest(step)).shapes
    )


def test_a_wider_input_begins_at_the_base_s_loss_and_trains_alike(rank_pool, folder, base_loss):
    run = partial(rank_pool(1), logged_micro, folder)
    lines = "\n".join(run(words(folder, "wide", *WIDE, "args.save_interval=2"))[0])
    assert "checked on the first sample: the model starts as its base" in lines
    copied, zeroed, new = re.search(r"mixins\.patch_embed +([\d,]+) +([\d,]+) +([\d,]+)", lines).groups()
    assert (zeroed, new) == (f"{16 * 4 * 128:,}", "0"), "as many columns as the base has"
    assert int(copied.replace(",", "")) > 16 * 4 * 128
    expected = losses(folder, "wide")
    assert expected[0] == pytest.approx(base_loss, rel=1e-6)
    own = words(folder, "widetp", *WIDE, "args.model_parallel_size=2")
    rank_pool(2)(train_micro, folder, own, model_parallel_size=2)
    assert losses(folder, "widetp") == pytest.approx(expected, rel=1e-4)
    lora = words(folder, "widelora", *WIDE, "args.train_iters=2")
    rank_pool(1)(train_micro, folder, lora, "lora")
    rank_pool(1)(train_micro, folder, [*lora, "args.train_iters=3", "args.resume=must"], "lora")
    rank_pool(1)(train_micro, folder, words(folder, "loralong", *WIDE), "lora")
    assert losses(folder, "widelora") == losses(folder, "loralong")
    step = run_directory(folder, "widelora") / "3"
    trained = read_fragments(step, read_manifest(step)).shapes
    assert "mixins.patch_embed.proj.weight" in trained, "new columns train next to adapters"
    assert all(".matrix_" in name or "patch_embed.proj" in name for name in trained)

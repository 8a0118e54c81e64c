"""Loss terms in whole runs: pairs against the model without its adapters, and a module that a term reads."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from sat_train.checkpoint.fragments import read_fragments
from sat_train.checkpoint.manifest import read_manifest
from sat_train.distributed.processes import stop_processes
from sat_train.training.callbacks.metrics_file import read_metrics
from tests.ranks.micro import run_directory, train_micro, write_micro

pytestmark = pytest.mark.ranks

_RECORDS = '''
"""A clip is better than its mirror image; states are small; the first frame is grey."""
from sat_train.parts import ConditionParams, LossTermParams, ModuleParams, part

@part("condition", "Mirrored", build=".network:Mirrored")
class MirroredParams(ConditionParams):
    """The clip's mirror image, which lost."""
    adds_rows = True

@part("module", "StateHead", build=".network:StateHead")
class StateHeadParams(ModuleParams):
    """Hands a projection of the states to the loss."""

@part("loss_term", "SmallStates", build=".network:SmallStates")
class SmallStatesParams(LossTermParams):
    """The mean square of the projected states."""

@part("loss_term", "Grey", build=".network:Grey")
class GreyParams(LossTermParams):
    """The mean square of the pixels of the first predicted frame."""
    decodes = True
'''
_NETWORK = """
import torch
from sat_train.extend import Condition, LossTerm, Mixin

class Mirrored(Condition):
    tensors = frozenset({"mean", "logvar"})

    def encode(self, sample, encoders):
        moments = encoders.video(sample.video_tchw.flip(-1), subject="mirror image")
        return {name: tensor[None] for name, tensor in moments.items()}

class StateHead(Mixin):
    def __init__(self, params, model):
        super().__init__(params, model)
        self.project = torch.nn.Linear(model.width, 4)

    def tap(self, hidden_bld, block, forward):
        forward.outputs[self.name] = self.project(hidden_bld)

class SmallStates(LossTerm):
    def __call__(self, step):
        return step.outputs["head"].float().square().flatten(1).mean(1)

class Grey(LossTerm):
    def __call__(self, step):
        return step.decode(step.x0_pred(), frames=(0, 1)).square().flatten(1).mean(1)
"""
_WORDS = [
    "model.conditions.mirrored.target=Mirrored",
    "model.modules.head.target=StateHead",
    "model.loss_terms.diffusion.weight=0.25",
    "model.loss_terms.better={target: Preference, weight: 2.0, params: {beta: 50.0}}",
    "model.loss_terms.states={target: SmallStates, weight: 0.5}",
    "model.loss_terms.grey={target: Grey, weight: 0.125}",
    "args.checkpoint_activations=gemm",
    "args.lr_decay_style=constant",
    "args.warmup=0",
]
_WEIGHTS = {"diffusion": 0.25, "better": 2.0, "states": 0.5, "grey": 0.125}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("terms")
    write_micro(path)
    (path / "terms").mkdir()
    (path / "terms/__init__.py").write_text(_RECORDS)
    (path / "terms/network.py").write_text(_NETWORK)
    stop_processes()
    return path


def words(folder: Path, name: str, steps: int, *more: str) -> list[str]:
    run = [f"args.experiment_name={name}", f"args.train_iters={steps}"]
    return ["--extension", str(folder / "terms"), *_WORDS, *run, *more]


def steps_of(folder: Path, name: str) -> list[dict]:
    records = read_metrics(run_directory(folder, name) / "metrics.jsonl")
    return [record for record in records if "loss" in record]


@pytest.fixture(scope="module")
def stage1(rank_pool, folder) -> list[dict]:
    rank_pool(2)(train_micro, folder, words(folder, "stage1", 2), "lora")
    return steps_of(folder, "stage1")


def test_the_loss_is_the_weighted_sum_of_the_terms_that_are_reported(folder, stage1):
    for record in stage1:
        terms = {name: record[f"loss/{name}"] for name in _WEIGHTS}
        assert record["loss"] == pytest.approx(sum(_WEIGHTS[n] * x for n, x in terms.items()), rel=1e-6)
    assert stage1[0]["loss/better"] == pytest.approx(math.log(2), rel=1e-6)
    assert stage1[-1]["loss/better"] != stage1[0]["loss/better"]
    step = run_directory(folder, "stage1") / "2"
    saved = read_fragments(step, read_manifest(step), model_rank=0, model_size=1)
    for name in ("mixins.head.project.weight", "mixins.head.project.bias"):
        assert saved.whole("exp_avg")[name][:].abs().max() > 0, "a gradient through the tap"


@pytest.mark.parametrize("stage", [3])
def test_terms_outputs_and_the_reference_agree_at_every_stage(rank_pool, folder, stage1, stage):
    name = f"stage{stage}"
    more = (f"args.zero_stage={stage}", "args.gradient_accumulation_steps=2", "args.batch_size=1")
    rank_pool(2)(train_micro, folder, words(folder, name, 2, *more), "lora")
    for found, expected in zip(steps_of(folder, name), stage1, strict=True):
        for key in ("loss", *(f"loss/{term}" for term in _WEIGHTS)):
            assert found[key] == pytest.approx(expected[key], rel=1e-4), key


def test_a_run_with_terms_resumes_bit_for_bit_and_validates_them(rank_pool, folder, stage1):
    run = partial(rank_pool(2), train_micro, folder)
    run(words(folder, "half", 1), "lora")
    run(words(folder, "half", 2, "args.resume=must", "args.eval_interval=2"), "lora")
    resumed = steps_of(folder, "half")
    for key in ("loss", "grad_norm", *(f"loss/{term}" for term in _WEIGHTS)):
        assert [record[key] for record in resumed] == [record[key] for record in stage1], key
    records = read_metrics(run_directory(folder, "half") / "metrics.jsonl")
    validated = next(record for record in records if "valid_loss" in record)
    assert validated["valid_loss/diffusion"] == validated["valid_loss"]
    assert torch.tensor([validated[f"valid_loss/{term}"] for term in _WEIGHTS]).isfinite().all()

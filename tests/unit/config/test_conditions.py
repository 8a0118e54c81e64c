"""Conditions in a configuration: every kind fits every released model, and what cannot work is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sat_train.config import load_run_config
from sat_train.distributed.processes import start_single_process, stop_processes
from sat_train.errors import ConfigError
from sat_train.models.build import build_dit

KINDS = sorted(Path("configs/condition").glob("*.yaml"))
MODELS = sorted(path for path in Path("configs/model").glob("*.yaml") if "tiny" not in path.name)
VIDEO = ["data.fields.control.kind=video", "model.conditions.control.target=ControlVideo"]


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> None:
    start_single_process()
    yield
    stop_processes()


@pytest.mark.parametrize("kind", KINDS, ids=lambda path: path.stem)
def test_a_kind_fits_every_released_model(kind: Path) -> None:
    assert len(MODELS) == 5
    for model in MODELS:
        base = load_run_config([model, "configs/sft.yaml"], purpose="check", check_paths=False).spec
        config = load_run_config([model, "configs/sft.yaml", kind], purpose="check", check_paths=False)
        spec = config.spec
        (choice,) = config.model.conditions.values()
        assert not config.notes
        assert spec.in_channels == base.in_channels + choice.params.channels(spec)
        dit = build_dit(replace(spec, layers=6), device="meta", dtype=torch.float32)
        weights = dit.mixins["patch_embed"].proj.weight
        assert weights.flatten(1).shape[1] == spec.in_channels * spec.patch[0] * spec.patch[1] * spec.patch[2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["model.conditions.a.target=FramesInSlot", "model.conditions.b.target=FramesInSlot"],
            r"conditions\.b = FramesInSlot: expected one condition in the image latent, .*conditions\.a is",
        ),
        (
            ["model.conditions.a.target=FramesInSlot", "model.noised_image_dropout=0.1"],
            r"noised_image_dropout = 0\.1: expected 0: model\.conditions\.a takes its place",
        ),
        (
            [*VIDEO, "model.conditions.control.params.field=contrl"],
            r"params\.field = contrl: expected a name in data\.fields \(control\); did you mean 'control'",
        ),
        (
            ["data.fields.control.kind=mask", VIDEO[1]],
            r"field = control: expected a field of kind video, and data\.fields\.control has kind mask",
        ),
        (
            [*VIDEO, "model.modules.branch.target=ControlBranch"],
            r"conditions\.control\.params\.into = channels: expected extras: model\.modules\.branch\.params",
        ),
        (
            [*VIDEO, "args.guidance_drops=[text,contrl]"],
            r"guidance_drops\.1 = contrl: expected a condition .*: text, control; did you mean 'control'",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_run_config(["configs/sft.yaml"], words)


def test_a_table_of_positions_ends_with_the_clip() -> None:
    files = ["configs/model/cogvideox_tiny_i2v.yaml", "configs/sft.yaml", "configs/condition/reference.yaml"]
    load_run_config(files, check_paths=False)
    with pytest.raises(ConfigError, match=r"position = continue: expected repeat_first: the learned table"):
        load_run_config(files, ["model.conditions.reference.params.position=continue"], check_paths=False)


def test_a_condition_that_nothing_reads_is_named() -> None:
    words = [*VIDEO, "model.conditions.control.params.into=extras"]
    (note,) = [note for note in load_run_config(["configs/sft.yaml"], words).notes if "control" in note]
    assert "a module, or `params.into: channels`" in note
    branch = ["model.modules.branch.target=ControlBranch"]
    notes = load_run_config(["configs/sft.yaml"], [*words, *branch]).notes
    assert not [note for note in notes if "conditions_are_read" in note]

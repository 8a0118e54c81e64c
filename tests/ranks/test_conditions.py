"""Every kind of condition trains, resumes bit for bit and exports, on a micro model of every family.

A few pairs run here. `SAT_TRAIN_MATRIX=1` runs all kinds on all families, for ten steps.
"""

from __future__ import annotations

import math
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from sat_train.checkpoint.fragments import read_fragments
from sat_train.checkpoint.manifest import read_manifest
from sat_train.cli.convert import main as convert
from sat_train.distributed.processes import stop_processes
from sat_train.interchange.module_files import read_module_files
from sat_train.training.callbacks.metrics_file import read_metrics
from tests.ranks.conditions import FAMILIES, KINDS, train_condition, write_condition_runs
from tests.ranks.micro import run_directory

pytestmark = pytest.mark.ranks

WHOLE = os.environ.get("SAT_TRAIN_MATRIX") == "1"
STEPS = 10 if WHOLE else 4
ALL = [(family, kind) for family in FAMILIES for kind in KINDS]
SOME = [
    ("cogvideox1.5_tiny_i2v", "frames_in_slot"),
    ("cogvideox_tiny_i2v", "control_branch"),
    ("cogvideox_tiny_i2v", "control_pixels"),
    ("cogvideox1.5_tiny", "inpainting"),
    ("cogvideox_tiny", "reference"),
]
CASES = ALL if WHOLE else SOME


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("conditions")
    write_condition_runs(path)
    stop_processes()
    return path


def losses_of(run: Path) -> list[float]:
    return [each["loss"] for each in read_metrics(run / "metrics.jsonl")]


def masters(run: Path) -> dict[str, torch.Tensor]:
    step = run / str(STEPS)
    saved = read_fragments(step, read_manifest(step), model_rank=0, model_size=1)
    return {name: saved.whole("master")[name][:] for name in saved.shapes}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_kind_trains_resumes_bit_for_bit_and_exports(rank_pool, folder, tmp_path, family, kind):
    run = partial(rank_pool(1), train_condition, folder, family, kind)
    name = f"{kind}{FAMILIES.index(family)}"
    words = [f"args.experiment_name={name}", f"args.train_iters={STEPS}", f"args.save_interval={STEPS // 2}"]
    run(words)
    path = run_directory(folder, name)
    losses, weights = losses_of(path), masters(path)
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    shutil.rmtree(path / str(STEPS))
    run([*words, "args.resume=must"])
    assert losses_of(path) == losses
    again = masters(path)
    assert again.keys() == weights.keys()
    assert [name for name in weights if not torch.equal(weights[name], again[name])] == []
    convert([str(path), str(tmp_path / "sat"), "--to", "sat"])
    assert list((tmp_path / "sat").rglob("*.pt"))
    if kind == "frames_in_slot" and "i2v" in family:
        _loads_in_diffusers(path, tmp_path / "diffusers")
    if kind == "control_pixels" and "1.5" not in family:
        convert([str(path), str(tmp_path / "theirs"), "--to", "controlnet"])
        convert([str(tmp_path / "theirs"), str(tmp_path / "modules"), "--to", "modules"])
        back = read_module_files([tmp_path / "modules"])
        assert [name for name in weights if not torch.equal(weights[name], back[name])] == []


def _loads_in_diffusers(run: Path, dest: Path) -> None:
    """Known frames need no weights of their own: the export is the model that diffusers knows."""
    from diffusers import CogVideoXTransformer3DModel

    convert([str(run), str(dest), "--to", "diffusers"])
    theirs, info = CogVideoXTransformer3DModel.from_pretrained(dest / "transformer", output_loading_info=True)
    assert theirs.config.in_channels == 32
    assert not [keys for keys in info.values() if keys]

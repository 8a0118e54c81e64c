"""Each example is short, changes nothing of the package, and keeps the laws of parts.

SAT_TRAIN_ALL_LAWS=1 tries all laws, those that train on two ranks too; without it the fast ones.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sat_train.config import load_run_config
from sat_train.distributed.processes import start_single_process
from sat_train.models.build import build_dit
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.testing import LAWS, check_extension

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/__init__.py"))
MOST_LINES = 150
FAST = ("typos", "base", "gradients", "drop")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The frozen encoder of `videorepa`, as its tool writes it."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    tool = ROOT / "examples/videorepa/make_encoder.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tool.parent)
        patch.setattr(sys, "argv", [str(tool), str(path)])
        runpy.run_path(str(tool), run_name="__main__")
    return path


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_an_example_keeps_the_laws_of_parts(folder: Path, encoder: Path) -> None:
    words = {"videorepa": [f"model.conditions.features.params.weights={encoder}"]}.get(folder.name, [])
    laws = LAWS if os.environ.get("SAT_TRAIN_ALL_LAWS") else FAST
    report = check_extension(folder, folder / f"{folder.name}.yaml", *words, laws=laws)
    print(report)
    assert {"holds"} == {
        each.outcome for each in report.results if each.law in ("typos", "base", "gradients")
    }


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_an_example_is_short_and_says_what_differs(folder: Path) -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    assert len(code.splitlines()) <= MOST_LINES
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert all(part in page for part in ("**What differs.**", "Source: [", f"examples/{folder.name} --base"))
    row = next(
        line for line in (ROOT / "examples/README.md").read_text().splitlines() if f"({folder.name}/" in line
    )
    assert abs(int(re.findall(r"(\d+) \|$", row)[0]) - len(code.splitlines())) <= 10


def opened(name: str) -> DiffusionTransformer:
    """Builds the embedded model with an example whose new weights have an effect."""
    files = [ROOT / "configs/sft.yaml", ROOT / f"examples/{name}/{name}.yaml"]
    words = ["--extension", str(ROOT / "examples" / name)]
    start_single_process()
    dit = build_dit(load_run_config(files, words, purpose="check").spec, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return dit.eval()


@torch.no_grad()
def rows_it_changes(dit: DiffusionTransformer, name: str, extra: Tensor, timesteps_b: Tensor) -> list[bool]:
    """Returns, for each row, whether the module changes the prediction."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(len(extra), 3, 16, 4, 6, generator=generator)
    text = torch.randn(len(extra), 32, 64, generator=generator)
    (key,) = dit.modules_of_its_own()
    predictions = [dit(latent, timesteps_b, text, extras={name: extra})]
    dit.del_mixin(key.split(".")[1])
    predictions.append(dit(latent, timesteps_b, text))
    return [not torch.equal(ours, base) for ours, base in zip(*predictions, strict=True)]


def test_the_camera_branch_acts_at_high_noise_alone() -> None:
    rays = torch.randn(3, 3, 24, 4, 6)
    assert rows_it_changes(opened("ac3d"), "camera", rays, torch.tensor([0, 599, 600])) == [
        False,
        False,
        True,
    ]


def test_the_inpainting_branch_is_silent_where_everything_is_masked() -> None:
    context = torch.randn(2, 3, 17, 4, 6)
    context[:, :, -1] = torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    timesteps = torch.tensor([500, 500])
    assert rows_it_changes(opened("videopainter"), "context", context, timesteps) == [False, True]

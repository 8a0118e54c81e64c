"""What only a GPU can show: NCCL, half precision, compiled kernels. Skipped without one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sat_train.checkpoint.layout import CLIENT_STATE
from sat_train.checkpoint.manifest import read_manifest
from tests.runs.launching import ROOT, run, run_directories, training_lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FAST = [
    "args.log_interval=1",
    "args.eval_interval=null",
    "args.valid_video_interval=null",
    "args.train_iters=6",
]


def losses(save: Path, *words: str) -> list[float]:
    base = ["--base", str(ROOT / "configs" / "sft.yaml")]
    done = run("train_video.py", [*base, *FAST, f"args.save={save}", *words])
    assert done.returncode == 0, done.output
    return [float(line["loss"]) for line in training_lines(run_directories(save)[0]).values()]  # type: ignore[arg-type]


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    """Same samples and noise; bf16 has eight bits, so losses agree to about a percent."""
    whole = losses(tmp_path / "fp32")
    half = losses(tmp_path / "bf16", "deepspeed.bf16.enabled=true")
    assert half == pytest.approx(whole, rel=0.03)


def test_fp16_with_a_loss_scale_trains(tmp_path: Path) -> None:
    assert all(math.isfinite(loss) for loss in losses(tmp_path, "deepspeed.fp16.enabled=true"))


def test_compiled_blocks_follow_eager_ones(tmp_path: Path) -> None:
    """Fused kernels round at other places: the sixth of six fp32 losses agrees to a thousandth."""
    eager = losses(tmp_path / "eager")
    compiled = losses(tmp_path / "compiled", "args.compile=blocks")
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_activation_checkpointing_changes_no_loss(tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain")
    checkpointed = losses(tmp_path / "checkpointed", "args.checkpoint_activations=true")
    assert checkpointed == pytest.approx(plain, rel=1e-5)


def test_a_save_in_the_background_writes_the_bytes_of_one_that_is_waited_for(tmp_path: Path) -> None:
    """The seed is that of the same run, so its checkpoints may only differ in how they were written."""
    hashes = []
    for async_save in ("on", "off"):
        save, words = tmp_path / async_save, ("args.deterministic=true", "args.save_interval=2")
        losses(save, *words, f"args.async_save={async_save}")
        manifest = read_manifest(run_directories(save)[0] / "4")
        hashes.append({file.name: file.sha256 for file in manifest.files if file.name != CLIENT_STATE})
    assert hashes[0] == hashes[1]

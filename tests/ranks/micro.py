"""Whole runs in a second: a micro model with random weights on a few of the demo's clips."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sat_train.config import RunConfig, load_run_config
from sat_train.config.paths import ASSETS
from sat_train.distributed.processes import ProcessMesh, start_single_process
from sat_train.distributed.seeds import derive_generator

ROOT = Path(__file__).resolve().parents[2]
# numbers of a logged step that differ from run to run
TIMES = {"step_time_s", "data_wait_s", "samples_per_s", "peak_memory_gib", "tflops", "mfu"}

_MICRO = """
args:
  load: {folder}/dit.safetensors
  save: {folder}/runs
  train_data: ["{folder}/train"]
  valid_data: ["asset:demo/valid"]
  batch_size: 2
  num_workers: 0
  log_interval: 1
  tensorboard: false
  eval_interval: null
  valid_video_interval: null
data:
  params: {{video_size: [32, 32], max_num_frames: 5}}
model:
  network_config:
    params:
      {{num_layers: 1, hidden_size: {width}, num_attention_heads: {heads}, time_embed_dim: 32, num_frames: 5,
        latent_height: 4, latent_width: 4}}
  first_stage_config:
    params:
      ckpt_path: {folder}/vae.pt
      encoder_config: {{params: {{ch: 4, ch_mult: [1, 1, 1, 1]}}}}
      decoder_config: {{params: {{ch: 4, ch_mult: [1, 1, 1, 1]}}}}
deepspeed:
  optimizer: {{params: {{lr: 1e-2}}}}
"""


def write_micro(folder: Path, *, heads: int = 1) -> None:
    """Writes `micro.yaml`, and the weights and clips it names. The tiny T5 is that of the package."""
    from sat_train.models.build import build_dit
    from sat_train.models.vae.build import build_vae

    _copy_clips(folder / "train")
    (folder / "micro.yaml").write_text(_MICRO.format(folder=folder, heads=heads, width=64 * heads))
    start_single_process()
    config = micro_run(folder, check_paths=False)
    dit = build_dit(config.spec, device="cpu", dtype=torch.float32)
    vae = build_vae(config.spec, device="meta")
    save_random(dit, folder / "dit.safetensors")
    # read whole, where a file of safetensors is opened for each of 300 tensors
    torch.save(random_state(vae), folder / "vae.pt")


def _copy_clips(target: Path) -> None:
    """Copies a dozen of the demo's clips of all kinds: a run looks into each of its clips as it begins."""
    for kind in ("videos", "labels"):
        (target / kind).mkdir(parents=True)
        for path in sorted((ASSETS / "demo/train" / kind).iterdir())[::5]:
            shutil.copy(path, target / kind)


def micro_run(folder: Path, *words: str, preset: str = "sft", check_paths: bool = True) -> RunConfig:
    """Returns the configuration of `write_micro`'s model with words of a command line."""
    base = [
        ROOT / "configs/model/cogvideox_tiny.yaml",
        ROOT / f"configs/{preset}.yaml",
        folder / "micro.yaml",
    ]
    return load_run_config([str(path) for path in base], list(words), check_paths=check_paths)


def train_micro(mesh: ProcessMesh, folder: Path, words: list[str], preset: str = "sft") -> None:
    """Runs the training command's work on this rank."""
    from sat_train.training.build import train

    train(micro_run(folder, *words, preset=preset), mesh)


def logged_micro(mesh: ProcessMesh, folder: Path, words: list[str]) -> list[str]:
    """Runs the training command's work on this rank; returns what it logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sat_train")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        train_micro(mesh, folder, words)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return lines


def run_directory(folder: Path, name: str) -> Path:
    """Returns the run directory of the one run of this name."""
    (path,) = (folder / "runs").glob(f"{name}-*")
    return path


def save_random(module: nn.Module, path: Path) -> None:
    save_file(random_state(module), path)


def random_state(module: nn.Module) -> dict[str, Any]:
    """Every gate is open: weights that begin at zero would keep gradients from what lies behind them."""
    state: dict[str, Any] = {}
    for index, (name, tensor) in enumerate(module.state_dict().items()):
        noise = torch.randn(tensor.shape, generator=derive_generator(0, "micro", index))
        is_norm = tensor.dim() == 1 and name.endswith("weight")
        state[name] = (1.0 if is_norm else 0.0) + 0.1 * noise
    return state

"""Runs of every kind of condition on a micro model of every family, with clips that have all fields."""

from __future__ import annotations

from pathlib import Path

import torch

from sat_train.config import RunConfig, load_run_config
from sat_train.distributed.processes import ProcessMesh, start_single_process
from tests.ranks.micro import ROOT, random_state, save_random
from tools.make_control_videos import write_sets

FAMILIES = ("cogvideox_tiny", "cogvideox_tiny_i2v", "cogvideox1.5_tiny", "cogvideox1.5_tiny_i2v")
# by the name of the file in configs/condition: the set of clips that has its fields, and further words
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "frames_in_slot": ("mosaic", ()),
    "control_branch": ("mosaic", ("model.modules.branch.params.blocks=1",)),
    "control_pixels": ("mosaic", ("model.modules.branch.params.blocks=1",)),
    "cameras": ("camera", ("model.modules.branch.params.blocks=1",)),
    "control_channels": ("mosaic", ()),
    "inpainting": ("mosaic", ()),
    "reference": ("mosaic", ()),
    "preference": ("moving", ("model.network_config.params.modules.lora_config.params.r=4",)),
}
_MICRO = """
args:
  load: {folder}/{family}.safetensors
  save: {folder}/runs
  train_data: ["{folder}/{clips}/train/manifest.jsonl"]
  batch_size: 2
  num_workers: 0
  log_interval: 1
  tensorboard: false
  eval_interval: null
  valid_video_interval: null
  lr: 1e-3
  lr_decay_style: constant
  warmup: 0
data:
  params: {{video_size: [32, 32], max_num_frames: 9, fps: 8}}
model:
  network_config:
    params:
      {{num_layers: 2, hidden_size: 64, num_attention_heads: {heads}, time_embed_dim: 32, num_frames: 9,
        latent_height: 4, latent_width: 4}}
  first_stage_config:
    params:
      ckpt_path: {folder}/vae.pt
      encoder_config: {{params: {{ch: 4, ch_mult: [1, 1, 1, 1]}}}}
      decoder_config: {{params: {{ch: 4, ch_mult: [1, 1, 1, 1]}}}}
"""


def write_condition_runs(folder: Path) -> None:
    """Writes clips with all fields, and micro models of every family with random weights."""
    from sat_train.models.build import build_dit
    from sat_train.models.vae.build import build_vae

    write_sets(folder, train=4, valid=2)
    start_single_process()
    for family in FAMILIES:
        heads = 2 if "1.5" in family else 1
        for clips in ("mosaic", "moving", "camera"):
            text = _MICRO.format(folder=folder, family=family, clips=clips, heads=heads)
            (folder / f"{family}-{clips}.yaml").write_text(text)
        config = load_run_config([*_files(folder, family, "mosaic")], check_paths=False)
        save_random(
            build_dit(config.spec, device="cpu", dtype=torch.float32), folder / f"{family}.safetensors"
        )
    torch.save(random_state(build_vae(config.spec, device="meta")), folder / "vae.pt")  # as in write_micro


def condition_run(folder: Path, family: str, kind: str, *words: str) -> RunConfig:
    """Returns the configuration of a run with one kind of condition."""
    clips, own = KINDS[kind]
    name = f"args.experiment_name={family.replace('.', '')}_{kind}"
    return load_run_config(_files(folder, family, clips, kind), [name, *own, *words])


def train_condition(mesh: ProcessMesh, folder: Path, family: str, kind: str, words: list[str]) -> None:
    """Runs the training command's work on this rank."""
    from sat_train.training.build import train

    train(condition_run(folder, family, kind, *words), mesh)


def _files(folder: Path, family: str, clips: str, kind: str | None = None) -> list[str]:
    condition = [] if kind is None else [ROOT / f"configs/condition/{kind}.yaml"]
    files = [ROOT / f"configs/model/{family}.yaml", ROOT / "configs/sft.yaml", *condition]
    return [str(path) for path in (*files, folder / f"{family}-{clips}.yaml")]

"""Committed steps of LoRA runs, as small as they can be."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sat_train.checkpoint.fragments import pack_fragments
from sat_train.checkpoint.layout import fragments_file_name, model_file_name
from sat_train.checkpoint.manifest import BaseWeights, Manifest
from sat_train.checkpoint.publish import RankReport, commit, open_temporary, publish_files
from sat_train.distributed.processes import ProcessMesh
from sat_train.files import HashingFile, write_file
from tests.unit.checkpoint.transformers import PREFIX

LAYER = "transformer.layers.1.attention.dense"


def adapters(seed: int = 3, *, rank: int = 2, alpha: float = 1.0, width: int = 32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{LAYER}.matrix_A.0": torch.randn(rank, width, generator=generator),
        f"{LAYER}.matrix_B.0": torch.randn(width, rank, generator=generator),
        "mixins.lora.rank": torch.tensor(rank),
        "mixins.lora.alpha": torch.tensor(alpha),
    }


def commit_weights(
    mesh: ProcessMesh, run: Path, step: int, weights: object, *, base: BaseWeights | None = None
) -> Path:
    """A step as a run without ZeRO leaves it: of a LoRA run, which names its base, or of all weights."""
    module = weights
    if isinstance(weights, dict):
        module = {PREFIX + key: value for key, value in weights.items()}
    state = {"module": module}

    def write(folder: Path) -> RankReport:
        def content(file: HashingFile) -> None:
            torch.save(state, file)

        def nothing_trained(file: HashingFile) -> None:
            torch.save(pack_fragments([]), file)

        files = [
            write_file(folder / model_file_name(0), content),
            write_file(folder / fragments_file_name(0), nothing_trained),
        ]
        return RankReport(files=files)

    run.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(
        step=step,
        samples_consumed=step,
        world_size=1,
        data_size=1,
        model_size=1,
        dtype="fp32",
        trainable_only=base is not None,
        config_digest="c" * 64,
        data_fingerprint="d" * 64,
        base_weights=base,
        versions={},
    )
    temporary = open_temporary(mesh, run, step=step, expected_bytes=0)
    files = partial(publish_files, temporary, run, manifest, lambda: None)
    return commit(mesh, files, write(temporary))

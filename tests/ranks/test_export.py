"""What a run trained comes out as it is: exports of real checkpoints, any ZeRO stage and number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sat_train.checkpoint.manifest import BaseWeights, Manifest
from sat_train.config import ModelSpec
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.interchange.adapters import is_adapter_key, read_lora
from sat_train.interchange.conversion import Conversion, convert
from sat_train.interchange.locate import load_weights, read_transformer_weights
from sat_train.interchange.sources import hash_weights
from sat_train.models.adapter import adapter_state_dict
from sat_train.models.loaded_adapters import load_updates
from tests.ranks.toy import frozen_names

pytestmark = pytest.mark.ranks

# Preset, ZeRO stage and ranks: what else a layout can change is a state, which test_any_to_any.py compares.
CASES = [
    ("cogvideox_5b", 1, 1),
    ("cogvideox_5b", 1, 2),
    ("cogvideox_5b", 2, 2),
    ("cogvideox_5b", 3, 2),
    ("cogvideox_5b_i2v", 3, 1),
]


def _train_and_save(
    mesh: ProcessMesh, model: ModelSpec, base: Path, run_directory: Path, zero_stage: int, lr: float
) -> None:
    """Two steps in bf16 from the weights of `base`, then a checkpoint of step 2."""
    from sat_train.checkpoint.run_state import RunState
    from sat_train.checkpoint.save import save_training_checkpoint
    from sat_train.distributed.collectives import on_rank_0
    from sat_train.engine.build import start_engine
    from sat_train.models.build import build_dit
    from sat_train.models.trainable import select_trainable
    from sat_train.training.callbacks.ema import ExponentialMovingAverage

    dit = build_dit(model, device="cpu", dtype=torch.bfloat16)
    weights = read_transformer_weights(base, model_rank=mesh.model_rank, model_size=mesh.model_size)
    load_weights(dit, weights, may_lack=adapter_state_dict(dit).keys())
    select_trainable(dit, not_trainable_prefixes=() if model.adapter is None else ["all"])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
    }
    engine = start_engine(
        dit,
        lambda tensors: torch.optim.AdamW(tensors.values(), lr=lr, weight_decay=0.0),
        config,
        mesh,
    )
    average = ExponentialMovingAverage(engine, 0.5)
    frames, height, width = model.trained_latent
    for step in range(2):
        generator = torch.Generator().manual_seed(10 * step + mesh.data_rank)
        latent = torch.randn(1, frames, model.in_channels, height, width, generator=generator)
        text = torch.randn(1, 6, 24, generator=generator)
        loss = engine(latent.bfloat16(), torch.tensor([500]), text.bfloat16()).float().square().mean()
        engine.backward(loss)
        engine.step(lr)
        average.update()
    has_lora = model.adapter is not None
    on_rank_0(mesh, lambda: run_directory.mkdir(parents=True))
    save_training_checkpoint(
        mesh,
        state=RunState(
            weights=engine.weights(left_out=frozen_names(engine.module) if has_lora else ()),
            pieces=engine.pieces(left_out=frozen_names(engine.module) if has_lora else ()),
            fragments=average.add_tensors(engine.fragments()),
            client_state={},
        ),
        run_directory=run_directory,
        manifest=Manifest(
            step=2,
            samples_consumed=2 * mesh.data_size,
            world_size=mesh.world_size,
            data_size=mesh.data_size,
            model_size=mesh.model_size,
            dtype="bf16",
            trainable_only=has_lora,
            config_digest="c" * 64,
            data_fingerprint="d" * 64,
            base_weights=BaseWeights(str(base), hash_weights(base)) if has_lora else None,
            versions={},
        ),
    )


def _models(preset: str, folder: Path) -> tuple[ModelSpec, ModelSpec, Any, Path]:
    """The model without and with adapters, its random weights in bf16, and where they are."""
    from sat_train.distributed.processes import start_single_process
    from tests.parity.presets import lora_words, narrow_model, random_transformer
    from tests.unit.checkpoint.transformers import write_sat_folder

    start_single_process()
    plain = narrow_model(preset)
    targets = r"[attention\.query_key_value$,attention\.dense$]"
    adapted = narrow_model(preset, lora_words(rank=4, alpha=2.0, targets=targets))
    weights = random_transformer(plain).bfloat16().state_dict()
    return plain, adapted, weights, write_sat_folder(folder / "base", weights)


@pytest.mark.parametrize(("preset", "zero_stage", "world_size"), CASES)
def test_without_learning_an_export_is_the_base_bit_for_bit(
    rank_pool: Callable[..., Any], tmp_path: Path, preset: str, zero_stage: int, world_size: int
) -> None:
    plain, adapted, weights, base = _models(preset, tmp_path)
    run = rank_pool(world_size)
    run(_train_and_save, plain, base, tmp_path / "sft", zero_stage, 0.0)
    for ema in (False, True):
        out = convert(Conversion(tmp_path / "sft", tmp_path / f"out{ema}", "diffusers", ema=ema, model=plain))
        contents = read_transformer_weights(out)
        assert contents.keys() == weights.keys()
        assert all(torch.equal(contents[key], value) for key, value in weights.items())

    run(_train_and_save, adapted, base, tmp_path / "lora", zero_stage, 0.0)
    out = convert(Conversion(tmp_path / "lora", tmp_path / "adapters", "diffusers"))
    parts = [part for parts in read_lora(out).values() for part in parts]
    assert len(parts) == 8
    assert not any(part.up.any() for part in parts)


def test_trained_adapters_come_out_apart_merged_and_with_their_base(
    rank_pool: Callable[..., Any], tmp_path: Path
) -> None:
    from sat_train.models.adapter import merge_adapters
    from sat_train.models.build import build_dit

    _, adapted, weights, base = _models("cogvideox_5b", tmp_path)
    run = tmp_path / "lora"
    rank_pool(2)(_train_and_save, adapted, base, run, 2, 1e-2)
    size = sum(path.stat().st_size for path in (run / "2").glob("*model_states.pt"))
    assert size < 0.2 * (base / "1000" / "mp_rank_00_model_states.pt").stat().st_size, "the base is not saved"

    # the run stands for its base with its adapters, as sampling and args.load read it
    whole = read_transformer_weights(run)
    dit = build_dit(adapted, device="cpu", dtype=torch.bfloat16)
    load_weights(dit, whole)
    assert all(torch.equal(whole[key], value) for key, value in weights.items())
    assert any(whole[key].any() for key in whole if ".matrix_B." in key)

    exported = read_lora(convert(Conversion(run, tmp_path / "apart", "diffusers")))
    load_updates(dit, exported)
    own = adapter_state_dict(dit)
    for key in filter(is_adapter_key, whole):
        assert torch.equal(own[key].double(), whole[key].double()), key  # alpha / rank is a power of two

    merged = read_transformer_weights(convert(Conversion(run, tmp_path / "merged", "sat", merge_lora=True)))
    merge_adapters(dit)
    for key in weights:
        assert torch.equal(merged[key], dit.state_dict()[key]), key

    # a base that has changed is no longer what the adapters stand on
    (base / "1000" / "mp_rank_00_model_states.pt").touch()
    state = torch.load(base / "1000" / "mp_rank_00_model_states.pt", weights_only=True)
    next(iter(state["module"].values())).add_(1)
    torch.save(state, base / "1000" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match="which has changed"):
        convert(Conversion(run, tmp_path / "again", "sat"))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_slices_of_the_model_axis_come_out_whole(
    rank_pool: Callable[..., Any], tmp_path: Path, zero_stage: int
) -> None:
    plain, adapted, weights, base = _models("cogvideox_5b", tmp_path)
    run = rank_pool(2)
    run(_train_and_save, plain, base, tmp_path / "sft", zero_stage, 0.0, model_parallel_size=2)
    contents = read_transformer_weights(convert(Conversion(tmp_path / "sft", tmp_path / "out", "sat")))
    assert all(torch.equal(contents[key], value) for key, value in weights.items())

    run(_train_and_save, adapted, base, tmp_path / "two", zero_stage, 1e-2, model_parallel_size=2)
    run = rank_pool(1)
    run(_train_and_save, adapted, base, tmp_path / "one", zero_stage, 1e-2)
    two, one = read_lora(tmp_path / "two"), read_lora(tmp_path / "one")
    assert two.keys() == one.keys()
    for layer, parts in two.items():
        for ours, theirs in zip(parts, one[layer], strict=True):
            assert (ours.down.shape, ours.up.shape, ours.scale) == (theirs.down.shape, theirs.up.shape, 0.5)

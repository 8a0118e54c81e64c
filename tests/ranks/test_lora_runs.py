"""LoRA runs: beginning with other adapters, resuming when the base has moved, cutting adapters over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sat_train.checkpoint.manifest import read_manifest
from sat_train.distributed.processes import ProcessMesh, start_single_process, stop_processes
from sat_train.interchange.adapters import read_lora
from sat_train.interchange.locate import base_weights_at
from sat_train.training.callbacks.metrics_file import read_metrics
from sat_train.training.models import build_trained_dit, find_start_weights
from sat_train.training.resume import find_resumed
from tests.ranks.micro import micro_run, run_directory, train_micro, write_micro

pytestmark = pytest.mark.ranks

LORA = "model.network_config.params.modules.lora_config.params"
KIND = "model.network_config.params.modules.lora_config.target={}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The micro model, and a LoRA run `first` of rank 4 at lora_alpha 128."""
    path = tmp_path_factory.mktemp("lora")
    write_micro(path)
    stop_processes()
    return path


@pytest.fixture(scope="module")
def first(rank_pool, folder) -> Path:
    return train(rank_pool, folder, "first", f"{LORA}.lora_alpha=128", "args.train_iters=3", "args.lr=3e-3")


def train(rank_pool, folder: Path, name: str, *words: str, preset: str = "lora") -> Path:
    given = [
        *(f"args.experiment_name={name}", "args.warmup=0", "args.save_interval=1"),
        *([f"{LORA}.r=4"] if preset == "lora" else []),
        *words,
    ]
    rank_pool(1)(train_micro, folder, given, preset)
    return run_directory(folder, name)


def first_loss(run: Path) -> float:
    return read_metrics(run / "metrics.jsonl")[0]["loss"]


ONE_STEP = ("args.train_iters=1", "args.lr=0")


@pytest.fixture(scope="module")
def losses(rank_pool, folder, first) -> tuple[float, float]:
    """The first loss without the adapters, and with them at the scale they were trained with."""
    same = train(rank_pool, folder, "same", f"args.load={first}", f"{LORA}.lora_alpha=128", *ONE_STEP)
    plain = train(rank_pool, folder, "plain", *ONE_STEP)
    return first_loss(plain), first_loss(same)


@pytest.mark.parametrize(
    ("name", "words", "preset"),
    [
        ("otheralpha", ["args.load={first}"], "lora"),
        ("higherrank", ["args.load={first}", f"{LORA}.r=16", f"{LORA}.lora_alpha=3"], "lora"),
        ("given", ["args.load_lora={first}"], "lora"),
        ("merged", ["args.load_lora={first}", "args.ema_decay=null"], "sft"),
        ("mergedrun", ["args.load={first}"], "sft"),
    ],
)
def test_a_run_that_begins_with_adapters_computes_what_they_were_trained_to_do(
    rank_pool, folder, first, losses, name, words, preset
):
    plain, same = losses
    words = [word.format(first=first) for word in words]
    run = train(rank_pool, folder, name, *words, *ONE_STEP, preset=preset)
    assert abs(same - plain) > 1e-3, "these adapters must matter"
    # fp32: B is scaled once, or the sum is formed before the product
    assert first_loss(run) == pytest.approx(same, rel=1e-4)
    if preset == "lora":
        check_same_adapters(run, first)
        base = read_manifest(run / "1").base_weights
        assert base == read_manifest(first / "3").base_weights, "its base is that of its adapters"


def check_same_adapters(run: Path, first: Path) -> None:
    result, expected = read_lora(run), read_lora(first)
    assert result.keys() == expected.keys()
    for layer, parts in expected.items():
        for ours, theirs in zip(result[layer], parts, strict=True):
            torch.testing.assert_close(ours.delta(), theirs.delta(), rtol=1e-5, atol=1e-7)


def test_several_files_add_up_each_at_its_strength(rank_pool, folder, first):
    words = (f"args.load_lora=[{first},{first}]", "args.lora_strength=[0.75,-0.25]", f"{LORA}.r=8", *ONE_STEP)
    run = train(rank_pool, folder, "half", *words)
    for layer, parts in read_lora(first).items():
        for ours, theirs in zip(read_lora(run)[layer], parts, strict=True):
            torch.testing.assert_close(ours.delta(), 0.5 * theirs.delta(), rtol=1e-5, atol=1e-7)


def test_a_run_resumes_on_its_base_after_that_has_moved(rank_pool, folder, tmp_path):
    base = tmp_path / "base.safetensors"
    base.write_bytes((folder / "dit.safetensors").read_bytes())
    words = (f"args.load={base}", "args.lr=1e-3", "args.lr_decay_style=constant")
    train(rank_pool, folder, "straight", *words, "args.train_iters=4")
    train(rank_pool, folder, "moved", *words, "args.train_iters=2")
    moved = base.rename(tmp_path / "elsewhere.safetensors")
    resumed = train(
        rank_pool,
        folder,
        "moved",
        *words,
        "args.train_iters=4",
        "args.resume=must",
        f"args.load_base={moved}",
    )
    (straight,) = (folder / "runs").glob("straight-*")
    losses = [
        [record["loss"] for record in read_metrics(run / "metrics.jsonl")] for run in (straight, resumed)
    ]
    assert losses[0] == losses[1]
    assert read_manifest(resumed / "4").base_weights.source == str(moved)


@torch.no_grad()
def _outputs(mesh: ProcessMesh, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what a model with weights of noise computes without and with the adapters of a file."""
    from sat_train.models.dit.sharding import full_shape, shard_weight
    from sat_train.models.loaded_adapters import load_updates
    from tests.networks import add_adapters, build_network
    from tests.unit.models.narrow import inputs

    dit = build_network()
    for key, parameter in dit.named_parameters():
        whole = full_shape(key, parameter.shape, mesh.model_size)
        noise = 0.2 * torch.randn(whole, generator=torch.Generator().manual_seed(sum(map(ord, key))))
        parameter.copy_(shard_weight(key, noise, rank=mesh.model_rank, size=mesh.model_size))
    plain = dit.eval()(*inputs())
    add_adapters(dit, rank=6, alpha=2.0, targets=(r"query_key_value$", r"dense", r"mlp\."))
    load_updates(dit, read_lora(folder / "lora.pt"))
    return plain, dit.eval()(*inputs())


def test_adapters_from_a_file_are_cut_over_the_ranks_of_the_model_axis(rank_pool, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        **{f"attention.query_key_value.matrix_{side}.{i}": side for side in "AB" for i in range(3)},
        **{
            f"{layer}.matrix_{side}.0": side
            for side in "AB"
            for layer in ("attention.dense", "mlp.dense_h_to_4h")
        },
    }
    sizes = {"mlp.dense_h_to_4h.matrix_B.0": 256}
    state = {
        f"transformer.layers.1.{key}": torch.randn(
            (5, 64) if side == "A" else (sizes.get(key, 64), 5), generator=generator
        )
        for key, side in shapes.items()
    }
    torch.save(state, tmp_path / "lora.pt")
    ((plain, whole),) = rank_pool(1)(_outputs, tmp_path)
    assert (whole - plain).abs().max() > 0.01, "these adapters must matter"
    for _, output in rank_pool(2)(_outputs, tmp_path, model_parallel_size=2):
        # fp32 sums over two slices
        torch.testing.assert_close(output, whole, rtol=1e-4, atol=1e-4)


VARIANTS = {
    "patterns": [
        f"{LORA}.use_rslora=true",
        f"{LORA}.rank_pattern={{dense: 2}}",
        f"{LORA}.alpha_pattern=[['query', 2]]",
        f"{LORA}.dropout=0.2",
    ],
    "dora": [
        KIND.format("Dora"),
        f"{LORA}.use_rslora=true",
        "args.quantize_base=nf4",
        "args.zero_stage=2",
        "args.bf16=true",
    ],
    "pissa": [
        KIND.format("Pissa"),
        f"{LORA}.rank_pattern={{dense: 2}}",
        "args.zero_stage=3",
        "args.bf16=true",
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_resumes_bit_for_bit_and_keeps_its_average(rank_pool, folder, variant):
    steady = ["args.lr=3e-3", "args.lr_decay_style=constant", "args.ema_decay=0.5"]
    words = [*VARIANTS[variant], *steady]
    straight = train(rank_pool, folder, f"{variant}straight", *words, "args.train_iters=5")
    train(rank_pool, folder, variant, *words, "args.train_iters=2")
    resumed = train(rank_pool, folder, variant, *words, "args.train_iters=5", "args.resume=must")
    losses = [[each["loss"] for each in read_metrics(run / "metrics.jsonl")] for run in (straight, resumed)]
    assert losses[0] == losses[1]
    assert read_manifest(resumed / "5").base_weights == base_weights_at(folder / "dit.safetensors")
    for ema in (False, True):
        ours, expected = (read_lora(run, ema=ema) for run in (resumed, straight))
        assert ours.keys() == expected.keys()
        for layer, parts in expected.items():
            for part, other in zip(ours[layer], parts, strict=True):
                assert torch.equal(part.delta(), other.delta())
                assert part.delta().any(), "these adapters must have trained"
                assert part.magnitude is None or torch.equal(part.magnitude, other.magnitude)
    if variant == "patterns":
        more = train(rank_pool, folder, "patternsmore", *words, f"args.load={straight}", *ONE_STEP)
        check_same_adapters(more, straight)
    if variant == "pissa":
        check_principal_vectors_are_those_of_the_checkpoint(folder, words)


def check_principal_vectors_are_those_of_the_checkpoint(folder: Path, words: list[str]) -> None:
    """With another seed the decomposition would round otherwise: what is loaded was not computed again."""

    def principal(*more: str, resumes: bool) -> dict[str, torch.Tensor]:
        given = ["args.experiment_name=pissa", "args.resume=must", f"{LORA}.r=4", "args.train_iters=6"]
        point = find_resumed(micro_run(folder, *words, *given, preset="lora")) if resumes else None
        config, mesh = micro_run(folder, *words, *given, *more, preset="lora"), start_single_process()
        dit = build_trained_dit(config, mesh, find_start_weights(config, mesh, point))
        stop_processes()
        return {key: value for key, value in dit.state_dict().items() if ".principal_" in key}

    saved, other, again = (
        principal(resumes=True),
        principal("args.seed=7", resumes=True),
        principal("args.seed=7", resumes=False),
    )
    assert saved
    assert all(torch.equal(other[key], value) for key, value in saved.items())
    assert not all(torch.equal(again[key], value) for key, value in saved.items())


def test_a_run_warns_by_name_of_adapters_that_were_trained_at_another_scale(folder, first, caplog):
    def warnings(*words: str) -> list[str]:
        caplog.clear()
        config = micro_run(folder, f"args.load={first}", f"{LORA}.r=4", *words, preset="lora")
        mesh = start_single_process()
        build_trained_dit(config, mesh, find_start_weights(config, mesh))
        stop_processes()
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    assert warnings(f"{LORA}.lora_alpha=128") == []
    (warning,) = warnings()
    assert "alpha / r = 32, at which" in warning
    assert "args.silence=[loaded_adapters_keep_their_scale]" in warning
    assert warnings("args.silence=[loaded_adapters_keep_their_scale]") == []

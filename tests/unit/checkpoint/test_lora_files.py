"""LoRA files of all trainers: merging, sampling and continuing, against W + strength * alpha / r * B @ A."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat_train.config import load_run_config
from sat_train.distributed.processes import ProcessMesh
from sat_train.errors import CheckpointError
from sat_train.interchange.adapter_export import updates_to_peft
from sat_train.interchange.adapters import (
    check_merged,
    merge_updates,
    read_lora,
    updates_of,
    without_adapters,
)
from sat_train.interchange.conversion import Conversion, convert
from sat_train.interchange.locate import load_weights, read_transformer_weights
from sat_train.models.build import build_dit
from sat_train.models.loaded_adapters import add_adapters_for, load_updates
from sat_train.models.low_rank import stacked, strengthened
from sat_train.weights.lazy import from_tensors
from tests.networks import add_adapters
from tests.unit.checkpoint.transformers import random_weights, write_sat_folder

LORAS = Path(__file__).parent / "loras"
TINY = "configs/model/cogvideox_tiny.yaml"
# file and alpha / rank of all its modules
SPELLINGS = {
    "a_diffusers_plain": 1.0,
    "b_kohya_underscores.safetensors": 0.5,
    "c_diffusion_model_prefix.safetensors": 1.0,
    "d_peft": 0.5,
    "e_diffusers_with_alpha.safetensors": 0.5,
}
BLOCK = "transformer_blocks.1"
QKV = "transformer.layers.1.attention.query_key_value"
EVERYTHING = (r"query_key_value$", r"dense$", r"mlp\.", r"adaLN_modulations\.")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    config = load_run_config([TINY], purpose="check", check_paths=False)
    base = convert(
        Conversion(
            Path(config.args.load),
            tmp_path_factory.mktemp("tiny") / "base",
            "diffusers",
            dtype=torch.float32,
            model=config.spec,
        )
    )
    return config, base


def pairs_of_spelling_a() -> dict[str, tuple[Tensor, Tensor]]:
    tensors = load_file(LORAS / "a_diffusers_plain" / "pytorch_lora_weights.safetensors")
    modules = sorted({key.split(".lora_")[0] for key in tensors})
    return {
        module.removeprefix("transformer."): (
            tensors[f"{module}.lora_A.weight"].double(),
            tensors[f"{module}.lora_B.weight"].double(),
        )
        for module in modules
    }


def transformer_file(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def check_sum(merged: dict[str, Tensor], base: dict[str, Tensor], deltas: dict[str, Tensor]) -> None:
    """Compares each of diffusers' tensors with base + delta in fp64; all others are the base's."""
    assert merged.keys() == base.keys()
    for key, weight in base.items():
        delta = deltas.get(key.removesuffix(".weight"))
        if delta is None:
            assert torch.equal(merged[key], weight), key
        else:
            # one rounding to fp32, after a sum in fp32
            torch.testing.assert_close(merged[key].double(), weight.double() + delta, rtol=1e-6, atol=1e-6)
            assert (merged[key] - weight).abs().max() > 1e-4, "this adapter must matter"


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_merges_to_weight_plus_strength_times_alpha_over_rank_times_b_a(
    mesh: ProcessMesh, tiny, tmp_path: Path, name: str, strength: float
) -> None:
    config, base = tiny
    out = convert(
        Conversion(
            Path(config.args.load),
            tmp_path / "out",
            "diffusers",
            lora=(LORAS / name,),
            lora_strength=(strength,),
            dtype=torch.float32,
            model=config.spec,
        )
    )
    scale = strength * SPELLINGS[name]
    deltas = {module: scale * (up @ down) for module, (down, up) in pairs_of_spelling_a().items()}
    check_sum(transformer_file(out), transformer_file(base), deltas)


def forward(dit) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1, 2, 16, 8, 12, generator=generator)
    text = torch.randn(1, 32, 64, generator=generator)
    with torch.no_grad():
        return dit.eval()(latent, torch.tensor([400]), text)


@pytest.mark.parametrize("name", SPELLINGS)
def test_sampling_with_and_continuing_from_a_file_compute_what_merging_gives(
    mesh: ProcessMesh, tiny, name: str
) -> None:
    config, _ = tiny
    weights = read_transformer_weights(config.args.load)
    updates = strengthened(read_lora(LORAS / name), 0.6)

    def built(change) -> Tensor:
        dit = build_dit(config.spec, device="cpu", dtype=torch.float32, initialize=False)
        load_weights(dit, weights, may_lack=dit.derived_keys())
        change(dit)
        return forward(dit)

    def continued(dit) -> None:
        add_adapters(dit, rank=16, alpha=1.0, targets=(*EVERYTHING, "final_layer.linear"))
        load_updates(dit, updates)

    merged = build_dit(config.spec, device="cpu", dtype=torch.float32, initialize=False)
    load_weights(merged, merge_updates(weights, updates, dtype=torch.float32), may_lack=merged.derived_keys())
    expected = forward(merged)
    assert (expected - built(lambda dit: None)).abs().max() > 1e-3, "this adapter must matter"
    sampled = built(lambda dit: add_adapters_for(dit, updates))
    # fp32 sums in another order
    torch.testing.assert_close(sampled, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(built(continued), sampled, rtol=1e-4, atol=1e-4)


def write_mixed(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """Several ranks; q and k without v; the two modulations that SAT fuses; a scale of its own for some."""
    generator = torch.Generator().manual_seed(1)
    sizes = {
        f"{BLOCK}.attn1.to_q": (4, 32, 32),
        f"{BLOCK}.attn1.to_k": (2, 32, 32),
        f"{BLOCK}.attn1.to_out.0": (7, 32, 32),
        f"{BLOCK}.ff.net.0.proj": (1, 32, 128),
        f"{BLOCK}.norm1.linear": (3, 8, 192),
        f"{BLOCK}.norm2.linear": (5, 8, 192),
        "transformer_blocks.0.norm2.linear": (2, 8, 192),
    }
    tensors, deltas = {}, {}
    for number, (module, (rank, inside, out)) in enumerate(sizes.items()):
        down, up = (torch.randn(shape, generator=generator) for shape in ((rank, inside), (out, rank)))
        tensors |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
        scale = 1.0
        if number % 2:
            tensors[f"transformer.{module}.alpha"] = torch.tensor(float(number))
            scale = number / rank
        deltas[module] = scale * (up.double() @ down.double())
    save_file(tensors, folder / "mixed.safetensors")
    return folder / "mixed.safetensors", deltas


def test_mixed_ranks_and_q_and_k_alone_are_read_and_come_out_again(mesh: ProcessMesh, tmp_path: Path) -> None:
    from sat_train.weights.diffusers_keys import transformer_to_diffusers

    weights = random_weights()
    path, deltas = write_mixed(tmp_path)
    base = {key: value.contiguous() for key, value in transformer_to_diffusers(weights).items()}
    updates = read_lora(path)
    assert updates[QKV][2] is None
    for result in (updates, read_exported(updates, tmp_path)):
        merged = merge_updates(from_tensors(weights, where="base"), result)
        ours = transformer_to_diffusers({key: merged[key] for key in merged})
        check_sum({key: value.contiguous() for key, value in ours.items()}, base, deltas)


def read_exported(updates, folder: Path):
    tensors, header = updates_to_peft(updates)
    assert {tensor.shape[0] for key, tensor in tensors.items() if "lora_A" in key} == {8}, "one rank for all"
    save_file(tensors, folder / "export.safetensors", metadata=header)
    return read_lora(folder / "export.safetensors")


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({"lora_alpha": 8}, {"to_q": 2.0, "to_k": 4.0}),
        ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_k": 1}}, {"to_q": 2.0, "to_k": 0.5}),
        ({"lora_alpha": 8, "use_rslora": True}, {"to_q": 4.0, "to_k": 8 / 2**0.5}),
    ],
)
def test_peft_s_settings_decide_the_scale_of_each_module(
    mesh: ProcessMesh, tmp_path: Path, settings: dict[str, object], scales: dict[str, float]
) -> None:
    tensors = {}
    for module, rank in {"to_q": 4, "to_k": 2}.items():
        name = f"base_model.model.{BLOCK}.attn1.{module}"
        tensors |= {
            f"{name}.lora_A.weight": torch.ones(rank, 32),
            f"{name}.lora_B.weight": torch.ones(32, rank),
        }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **settings}))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        query, key, value = read_lora(path)[QKV]
        assert (query.scale, key.scale, value) == (scales["to_q"], pytest.approx(scales["to_k"]), None)


BAD = [
    (
        {"transformer.nowhere.lora_A.weight": (2, 32), "transformer.nowhere.lora_B.weight": (32, 2)},
        "nowhere is no",
    ),
    ({f"{BLOCK}.attn1.to_q.lora_A.weight": (2, 32)}, "to_q has only one of its two matrices"),
    (
        {f"{BLOCK}.attn1.to_q.lora_A.weight": (2, 32), f"{BLOCK}.attn1.to_q.dora_scale": (32,)},
        r"1 keys do not belong to a LoRA: transformer_blocks\.1\.attn1\.to_q\.dora_scale",
    ),
    (
        {f"{BLOCK}.attn1.to_q.lora_A.weight": (2, 32), f"{BLOCK}.attn1.to_q.lora_B.weight": (32, 3)},
        r"to_q do not multiply: \[2, 32\] and \[32, 3\]",
    ),
    (
        {f"{BLOCK}.attn1.to_q.lora_A.weight": (2, 32), f"{BLOCK}.ff.net.2.weight": (32, 128)},
        r"ff\.net\.2\.weight",
    ),
    ({f"{BLOCK}.attn1.to_q.lora_A.weight": (2, 32), f"{BLOCK}.attn1.to_q.alpha": (3,)}, r"to_q\.alpha"),
    (
        {f"{BLOCK}.attn1.to_q.lora_A.weight": (0, 32), f"{BLOCK}.attn1.to_q.lora_B.weight": (32, 0)},
        "do not multiply",
    ),
]


@pytest.mark.parametrize(("shapes", "message"), BAD)
def test_what_is_not_understood_is_named_and_nothing_is_dropped(
    mesh: ProcessMesh, tmp_path: Path, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    "settings", [{"peft_type": "LOKR"}, {"use_dora": True}, {"init_lora_weights": "pissa"}]
)
def test_other_adapters_than_lora_are_refused_by_name(tmp_path: Path, settings: dict[str, object]) -> None:
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=f"adapter_config.json says {next(iter(settings))}"):
        read_lora(tmp_path)


def test_an_adapter_of_another_model_is_refused_with_both_shapes(mesh: ProcessMesh) -> None:
    updates = read_lora(LORAS / "a_diffusers_plain")
    message = r"query_key_value has an update of shape \[128, 128\], and its weight is \[32, 32\]"
    with pytest.raises(CheckpointError, match=message):
        merge_updates(from_tensors(random_weights(), where="base"), updates)


def test_adapters_in_the_place_of_weights_say_where_they_belong(mesh: ProcessMesh) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)holds LoRA adapters.*args\.load_lora"):
        read_transformer_weights(LORAS / "e_diffusers_with_alpha.safetensors")


def test_two_adapters_of_one_layer_add_up() -> None:
    first, second = (read_lora(LORAS / name) for name in ("a_diffusers_plain", "d_peft"))
    both = stacked(first, strengthened(second, 3.0))
    one, other, total = (
        updates["transformer.layers.2.attention.dense"][0] for updates in (first, second, both)
    )
    torch.testing.assert_close(
        total.delta(torch.float64), one.delta(torch.float64) + 3 * other.delta(torch.float64)
    )
    assert total.rank == 4


# K3: the dtype of the file must not decide what is left of an update


@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, None])
def test_a_merge_is_one_rounding_of_the_exact_sum_whatever_the_dtype_of_the_base(
    mesh: ProcessMesh, tmp_path: Path, base_dtype: torch.dtype, dtype: torch.dtype | None
) -> None:
    weights, small = random_weights(dtype=base_dtype), random_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    adapter = {f"{QKV}.matrix_A.{i}": torch.randn(3, 32, generator=generator) for i in range(3)} | {
        f"{QKV}.matrix_B.{i}": torch.randn(32, 3, generator=generator) * 1e-3 for i in range(3)
    }
    adapter["mixins.lora.alpha"] = torch.tensor(1.0)
    assert small.keys() == weights.keys()
    source = write_sat_folder(tmp_path / "sat", {**weights, **adapter})
    out = read_transformer_weights(
        convert(Conversion(source, tmp_path / "out", "sat", merge_lora=True, dtype=dtype))
    )
    parts = [
        adapter[f"{QKV}.matrix_B.{i}"].double() @ adapter[f"{QKV}.matrix_A.{i}"].double() for i in range(3)
    ]
    expected = weights[f"{QKV}.weight"].double() + torch.cat(parts) / 3
    contents = out[f"{QKV}.weight"]
    assert contents.dtype == (dtype or base_dtype)
    # half a step of the dtype, and a sum in fp32 before
    step = torch.finfo(contents.dtype).eps
    assert ((contents.double() - expected).abs() <= expected.abs() * step * 0.501 + 1e-6).all()
    for key, value in weights.items():
        if key != f"{QKV}.weight":
            assert torch.equal(out[key], value.to(dtype or base_dtype)), key


def test_a_merge_that_lost_the_update_is_not_verified(mesh: ProcessMesh) -> None:
    updates = read_lora(LORAS / "a_diffusers_plain")
    config = load_run_config([TINY], purpose="check", check_paths=False)
    base = without_adapters(read_transformer_weights(config.args.load))
    key = "transformer.layers.2.attention.dense.weight"
    merged = merge_updates(base, updates, dtype=torch.float32)
    check_merged(merged, base, updates)
    assert not updates_of(merged)
    for wrong in (base[key].float(), merged[key].half().float(), merged[key].T.contiguous()):
        written = merged.overlaid(from_tensors({key: wrong}, where="written"))
        with pytest.raises(CheckpointError, match=r"values of .*dense\.weight are not weight \+ scale"):
            check_merged(written, base, updates)


def test_values_beyond_the_range_of_the_dtype_are_an_error(mesh: ProcessMesh, tmp_path: Path) -> None:
    weights = random_weights()
    weights["time_embed.0.weight"][0, 0] = 1e6
    source = write_sat_folder(tmp_path / "sat", weights)
    with pytest.raises(
        CheckpointError, match=r"time_embed\.0\.weight has values beyond the range of float16"
    ):
        convert(Conversion(source, tmp_path / "out", "sat", dtype=torch.float16))
    assert not (tmp_path / "out").exists()

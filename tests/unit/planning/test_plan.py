"""Plans: FLOPs by closed forms, memory that fits when the plan says so, and words that make it fit."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest

from sat_train.cli.main import main
from sat_train.cli.plan import as_text
from sat_train.config import RunConfig, load_run_config
from sat_train.config.hardware import find_hardware, peak_tflops
from sat_train.distributed.processes import start_single_process, stop_processes
from sat_train.models.dit.sharding import tensor_parallel_layout
from sat_train.models.meta_models import build_meta_dit
from sat_train.planning.cache_size import ConditionBytes, count_clip_bytes, count_condition_bytes
from sat_train.planning.counting import count_passes
from sat_train.planning.duration import StepTime
from sat_train.planning.gpu_memory import count_weights
from sat_train.planning.planner import Planner

TINY = ["--base", "configs/model/cogvideox_tiny.yaml", "configs/sft.yaml"]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    start_single_process()
    yield
    stop_processes()


def _read(model: str, *files: str, words: tuple[str, ...] = ()) -> RunConfig:
    paths = [f"configs/model/{model}.yaml", *(f"configs/{name}.yaml" for name in files)]
    return load_run_config(paths, words, purpose="check", check_paths=False)


def _tokens(config: RunConfig) -> int:
    data = config.require_data().params
    return config.spec.tokens(config.spec.latent(data.max_num_frames, *data.video_size))


# forwards of the linear layers and of attention in a step, with what is recomputed; a flash kernel's backward
# is 2.5 forwards
@pytest.mark.parametrize(
    ("recipe", "policy", "linear", "attention"),
    [("sft", "off", 3, 3.5), ("sft", "full", 4, 4.5), ("sft", "attention", 4, 3.5), ("lora", "off", 2, 3.5)],
)
def test_work_is_that_of_the_closed_forms(recipe: str, policy: str, linear: float, attention: float) -> None:
    config = _read("cogvideox_5b", recipe, words=(f"args.checkpoint_activations={policy}",))
    flops, work = config.spec.flops(_tokens(config)), count_passes(config, batch_size=1).work
    adapters = 0.037 if recipe == "lora" else 0.0  # of the linear layers
    assert work.linear_flops == pytest.approx(linear * flops.linear * (1 + adapters), rel=0.02)
    assert work.attention_flops + work.attention_backward_flops == pytest.approx(
        attention * flops.attention, rel=0.001
    )


def test_mfu_counts_the_model_and_not_what_is_recomputed() -> None:
    config = _read("cogvideox_tiny", "sft", words=("args.compile=off",))
    flops = config.spec.flops(_tokens(config))
    counted = config.spec.training_flops(_tokens(config), trains_base=True)
    assert counted == 3 * (flops.linear + flops.attention)
    plan = Planner(find_hardware("h100"), gpus=8).plan(config)
    seconds = plan.tflops / plan.hardware.peak_tflops / plan.mfu
    assert seconds == pytest.approx(plan.step.total)


def test_more_gpus_share_the_states_only() -> None:
    config = _read("cogvideox_tiny", "sft", words=("args.zero_stage=2", "args.bf16=true", "args.compile=off"))
    # a single process has no master copies in fp32
    one, eight = (Planner(find_hardware("h100"), gpus=n).plan(config) for n in (1, 8))
    for phase, shared in zip(one.phases, eight.phases, strict=True):
        assert shared.optimizer == pytest.approx(phase.optimizer / 8, rel=0.1)
        assert shared.activations <= phase.activations
    assert eight.samples == 8 * one.samples


def test_ranks_that_share_a_model_hold_and_compute_a_part_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", *TINY, "args.compile=off", "args.eval_interval=null", "data.cache=read", "--json"]
    words += ["data.cache_dir=cache", "args.valid_video_interval=null", "args.checkpoint_activations=full"]
    trees = []
    for ranks in (1, 2):
        assert main([*words, f"args.model_parallel_size={ranks}", "--gpus", str(ranks)]) == 0
        trees.append(json.loads(capsys.readouterr().out))
        stop_processes()
    start_single_process()
    whole, shared = trees
    own = build_meta_dit(_read("cogvideox_tiny", "sft")).named_parameters()
    on_all = sum(each.numel() for name, each in own if tensor_parallel_layout(name) is None)
    assert 2 * shared["weights"] - on_all == whole["weights"]
    assert shared["samples"] == whole["samples"]
    assert shared["step"]["attention"] == pytest.approx(whole["step"]["attention"] / 2)
    assert shared["step"]["linear"] == pytest.approx(whole["step"]["linear"] / 2, rel=0.1)
    config = _read("cogvideox_tiny", "sft")
    # both sums of a block, forward, recomputed and backward, of the tokens in fp32
    row = config.args.batch_size * _tokens(config) * config.spec.width * 4
    seconds = 2 * 6 * config.spec.layers * row / 2 / find_hardware("h100").link_gbps / 1e9
    assert shared["step"]["communication"] == pytest.approx(seconds, rel=0.1)


@pytest.mark.parametrize(("preset", "gpus", "stage"), [("lora", 1, 1), ("sft", 4, 3)])
def test_ranks_that_divide_all_state_copy_the_checkpoint_between_them_to_save_it_in_the_background(
    preset: str, gpus: int, stage: int
) -> None:
    words = ("args.eval_interval=null", "args.valid_video_interval=null", f"args.zero_stage={stage}")
    words += ("args.compile=off",)
    planner = Planner(find_hardware("h100"), gpus=gpus)
    background, waiting = (
        planner.plan(_read("cogvideox_tiny", preset, words=(*words, f"args.async_save={mode}")))
        for mode in ("on", "off")
    )
    for ours, other in zip(background.phases, waiting.phases, strict=True):
        copied = background.checkpoint_bytes / gpus if ours.phase in ("step", "save") else 0.0
        assert ours.host - other.host == pytest.approx(copied, rel=0.01)


def test_a_text_encoder_on_the_cpu_takes_host_memory_instead() -> None:
    planner = Planner(find_hardware("h100"), gpus=1)
    words = ("args.bf16=true", "args.compile=off", "args.text_encoder_device=cpu")
    gpu, cpu = (planner.phases(_read("cogvideox_tiny", "sft", words=some)) for some in (words[:-1], words))
    size = 2 * count_weights(_read("cogvideox_tiny", "sft")).text_encoder
    for ours, other in zip(cpu, gpu, strict=True):
        if ours.phase == "precompute":  # where T5 is freed before the clips, if it was on the GPU
            assert ours.total <= other.total
        else:
            assert ours.total == pytest.approx(other.total - size)
            host = 0 if ours.phase == "load" else size  # it is read through host memory anyway
            assert ours.host - other.host == pytest.approx(host)


def test_the_cache_of_a_plan_holds_what_conditions_keep() -> None:
    words = (
        "data.fields={edges: {kind: video}, inside: {kind: mask}, camera: {kind: per_frame}}",
        "model.conditions.edges={target: ControlVideo, params: {field: edges}}",
        "model.conditions.inside={target: Inpainting, params: {mask: inside}}",
        "model.conditions.camera={target: FieldValues, params: {field: camera}}",
    )
    plain, config = _read("cogvideox_tiny", "sft"), _read("cogvideox_tiny", "sft", words=words)
    data, spec = config.require_data().params, config.spec
    text = spec.text.max_length * spec.text_width * 4  # fp32
    latent = spec.latent(data.max_num_frames, *data.video_size)
    mask = latent.padded_frames * latent.height * latent.width * 4
    moments = count_clip_bytes(plain) - text
    assert count_condition_bytes(plain) == ConditionBytes(0, ())
    assert count_condition_bytes(config) == ConditionBytes(int(2 * moments) + mask, ("camera",))


def test_inputs_in_host_memory_and_a_base_in_few_bits_take_what_they_say() -> None:
    full = "args.checkpoint_activations=full"
    config, offloaded = (
        _read("cogvideox_5b", "lora", words=(full, *more)) for more in ((), ("args.checkpoint_offload=true",))
    )
    row = _tokens(config) * config.spec.width * 2
    saved = count_passes(config, batch_size=1).peak - count_passes(offloaded, batch_size=1).peak
    assert saved == pytest.approx((config.spec.layers - 2) * row, rel=0.01)  # two are on the GPU at a time
    plain = count_weights(config)
    assert plain.text_encoder == pytest.approx(4.762e9, rel=1e-3)  # T5-XXL, where its folder is not there
    per_block = 2 * sum(config.spec.parameters().values()) / config.spec.layers
    for kind, bits in (("int8", 8.25), ("nf4", 4.25)):
        held = count_weights(_read("cogvideox_5b", "lora", words=(f"args.quantize_base={kind}",)))
        assert held.transformer == plain.transformer
        assert held.held_bytes == held.held * bits / 8
        assert held.held > 0.98 * sum(config.spec.parameters().values())
    swapped = count_weights(_read("cogvideox_5b", "lora", words=("args.block_swap=30",)))
    assert swapped.host_bytes == pytest.approx(30 * per_block, rel=0.03)
    assert swapped.held_bytes == pytest.approx(swapped.host_bytes / 15)


def test_words_of_the_ladder_make_the_run_fit(capsys: pytest.CaptureFixture[str]) -> None:
    eager = ("args.bf16=true", "args.compile=off")
    words = [*TINY, *eager, "--gpu-memory", "1.91", "--json"]
    assert main(["plan", *words]) == 1
    tree = json.loads(capsys.readouterr().out)
    totals = [max(phase["total"] for phase in tree["phases"]), *(rung["total"] for rung in tree["ladder"])]
    assert not tree["fits"]
    assert all(lower < higher for higher, lower in itertools.pairwise(totals))
    assert len(totals) > 1
    enough = str(totals[-1] / 2**30 + 1e-6)
    taken = [word for rung in tree["ladder"] for word in rung["words"]]
    files = [file for rung in tree["ladder"] for file in rung["files"]]
    again = ["plan", *TINY, *files, *eager, *taken, "--gpu-memory", enough]
    assert main(again) == 0
    assert "Computed, not measured." in capsys.readouterr().out


def test_a_run_that_keeps_inputs_in_host_memory_may_keep_everything_on_the_card(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["args.checkpoint_offload=true", "args.checkpoint_activations=full", "args.compile=off", "--json"]
    small = [*TINY, "data.params.max_num_frames=5", "args.valid_video_interval=null", *words]
    assert main(["plan", *small]) == 0
    faster = json.loads(capsys.readouterr().out)["faster"]
    assert "args.checkpoint_offload=false" in faster["words"]


def test_cards_are_known_by_the_names_that_cuda_gives_them() -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", "NVIDIA L40S"]
    assert [peak_tflops(name) for name in names] == [989, 312, 165, 362]
    assert peak_tflops("NVIDIA A10G") is None


def test_a_plan_says_why_it_has_no_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "args.compile=off", "args.train_iters=null", "args.epochs=3"]) == 0
    assert "as long as its data" in capsys.readouterr().out


def test_large_figures_of_a_plan_are_written_out() -> None:
    plan = Planner(find_hardware("h100"), 1).plan(_read("cogvideox_tiny", "sft", words=("args.compile=off",)))
    slow = StepTime(**dict.fromkeys(asdict(plan.step), 1234.5))
    large = replace(plan, step=slow, tflops=123456.0, hours=54321.0, cached_clip_bytes=10**10)
    text = as_text(large, [], None)
    assert "1,234" in text
    assert "123,456 TFLOP" in text
    assert "54,321 GPU-hours" in text
    assert not re.search(r"\de\+\d", text)

"""CogVideo's YAML runs here unmodified, and means the same."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from sat_train.config import RunConfig, load_run_config
from sat_train.config.catalog import all_keys, slot_targets
from sat_train.config.legacy import TARGETS, WITHOUT_EFFECT, reason_without_effect
from tests.unit.config.cogvideo_files import MEMBERS, Member, inference_file, model_file, sft_file

Write = Callable[[str, str], str]


def load_member(member: Member, write: Write, *words: str) -> RunConfig:
    # JSON is YAML
    files = [write("model.yaml", json.dumps(model_file(member))), write("sft.yaml", json.dumps(sft_file()))]
    return load_run_config(files, words, purpose="check", check_paths=False)


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.name)
def test_model_files_load_with_their_numbers(member: Member, write: Write) -> None:
    config = load_member(member, write)
    network = config.model.network_config.params
    assert (network.num_layers, network.hidden_size) == (member.layers, member.width)
    assert network.patch_size == ((2, 2, 2) if member.is_1_5 else (1, 2, 2))
    position = network.modules.pos_embed_config
    assert position.target == ("Rotary3DPositionEmbedding" if member.rotary else "Sincos3DPositionEmbedding")
    lora = network.modules.lora_config
    assert (lora.params.r if lora else None, lora.params.lora_alpha if lora else 1) == (member.lora_rank, 1)
    assert config.model.noised_image_input == member.image
    assert config.model.denoiser_config.params.discretization_config.params.shift_scale == (
        member.shift or 1.0
    )
    sampler = config.model.sampler_config
    assert (sampler.target, sampler.params.guider_config.target) == ("DPMPP2M", "DynamicGuidance")


def test_training_file_has_its_effect(write: Write) -> None:
    config = load_member(MEMBERS[2], write)
    assert (config.args.bf16, config.args.fp16, config.args.zero_stage, config.args.batch_size) == (
        True,
        False,
        2,
        2,
    )
    assert (config.args.lr, config.args.weight_decay, config.args.clip_grad) == (1e-5, 1e-4, 0.1)
    assert config.deepspeed.optimizer.type == "AdamW"
    assert config.deepspeed.optimizer.params.betas == (0.9, 0.95)
    assert config.args.checkpoint_activations
    assert config.data is not None
    assert config.data.params.skip_frms_num == 3


def test_short_clips_are_padded_as_their_loader_does(write: Write) -> None:
    """It repeats the last frame of 48 where 49 are wanted; our own file, or a word, may say otherwise."""
    member = next(iter(MEMBERS))
    assert load_member(member, write).data.params.short_clip == "pad"
    assert load_member(member, write, "data.params.short_clip=skip").data.params.short_clip == "skip"
    assert load_run_config([], [], purpose="check", check_paths=False).data.params.short_clip == "error"


def test_keys_without_effect_come_in_one_line(write: Write) -> None:
    (line,) = [
        note for note in load_member(MEMBERS[7], write).notes if note.startswith("Keys of older files")
    ]
    for key in (
        "model.augmentation_dropout, ",
        "model.loss_fn_config.params.fixed_frames",
        "model.loss_fn_config.params.sigma_sampler_config.params.group_num",
        "args.no_load_rng",
        "args.force_train",
        "model.log_keys",
        "deepspeed.loss_scale (belongs under `deepspeed.fp16`)",
        "deepspeed.hysteresis (belongs under `deepspeed.fp16`)",
        "deepspeed.optimizer.type=sat.ops.FusedEmaAdam",
    ):
        assert key in line
    assert "\n" not in line


def test_loss_scale_keys_have_an_effect_where_they_belong(write: Write) -> None:
    words = ["deepspeed.fp16={enabled: true, loss_scale_window: 7}", "deepspeed.bf16.enabled=false"]
    config = load_member(MEMBERS[0], write, *words)
    assert config.args.fp16
    assert config.deepspeed.fp16.loss_scale_window == 7


def test_sampling_file_needs_no_data(write: Write) -> None:
    files = [
        write("m.yaml", json.dumps(model_file(MEMBERS[6]))),
        write("i.yaml", json.dumps(inference_file())),
    ]
    config = load_run_config(files, ["args.load=x"], purpose="sample", check_paths=False)
    assert config.data is None
    assert (config.args.sampling_num_frames, config.args.sampling_image_size) == (22, (768, 1360))


def test_lora_preset_works_behind_their_model_files(write: Write) -> None:
    files = [write("model.yaml", json.dumps(model_file(MEMBERS[2]))), "configs/lora.yaml"]
    config = load_run_config(files, ["args.load=x"], check_paths=False, purpose="check")
    assert config.model.network_config.params.modules.lora_config.params.r == 128


def test_cpu_offload_becomes_offload_optimizer(write: Write) -> None:
    config = load_member(MEMBERS[2], write, "deepspeed.zero_optimization.cpu_offload=true")
    assert config.deepspeed.zero_optimization.offload_optimizer.device == "cpu"


def test_legacy_names_lead_to_targets_that_exist() -> None:
    known = {name for table in slot_targets().values() for name in table.params}
    assert set(TARGETS.values()) <= known


def test_a_key_is_either_read_or_without_effect() -> None:
    assert not WITHOUT_EFFECT.keys() & all_keys().keys()
    assert not [key for key in all_keys() if reason_without_effect(key)]

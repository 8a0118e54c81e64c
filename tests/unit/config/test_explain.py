"""What a person can ask about a configuration."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from sat_train.config.catalog import all_keys
from sat_train.config.explain import explain_key, list_values
from sat_train.config.json_schema import render_json_schema
from sat_train.config.parts.registry import parts_of, slot_names
from sat_train.config.sat_args import build_sat_args
from sat_train.errors import ConfigError
from tests.unit.config.conftest import Load


def test_every_key_is_described() -> None:
    for path, key in all_keys().items():
        assert key.description.endswith("."), path
        assert explain_key(path, None).startswith(path)


def test_a_key_with_its_value_and_source(load: Load) -> None:
    text = explain_key("args.lr", load("", "--lr", "0.25"))
    assert "Highest learning rate" in text
    assert "holds    a number >= 0" in text
    assert "default  0.0001" in text
    assert "value    0.25" in text
    assert "from     command line" in text


def test_a_target_lists_what_it_may_be() -> None:
    assert "DDIM, DPMPP2M" in explain_key("model.sampler_config.target", None)


def test_settings_are_those_of_the_part_that_is_named(load: Load) -> None:
    words = ["data.fields.score.kind=per_frame", "model.conditions.pose.target=FieldValues"]
    config = load("", *words, "model.conditions.pose.params.field=score")
    settings = explain_key("model.conditions.pose.params", config)
    assert "frames" in settings
    assert "relative" not in settings, "a setting of PlueckerCameras"
    assert "The numbers." in explain_key("model.conditions.pose.params.field", config)
    assert "target" in explain_key("model.conditions.pose", config)
    assert "An entry of model.conditions" in explain_key("model.conditions.pose", None)


def test_a_group_lists_its_keys() -> None:
    text = explain_key("deepspeed.zero_optimization", None)
    assert "stage3_max_live_parameters" in text
    assert "offload_optimizer" in text
    assert "pin_memory" not in text


def test_a_key_of_older_files_says_why_it_has_no_effect() -> None:
    assert "weights that do not fit are an error" in explain_key("args.force_train", None)


def test_an_unknown_key_is_a_fault() -> None:
    with pytest.raises(ConfigError, match=r"args\.lrr: expected a key that exists; did you mean 'lr'"):
        explain_key("args.lrr", None)


def test_all_values_with_their_sources(load: Load) -> None:
    config = load()
    lines = list_values(config).splitlines()
    assert len(lines) == len(config.sources)
    assert any(line.split() == ["args.train_iters", "1000", "configs/sft.yaml"] for line in lines)


def test_the_shipped_json_schema_is_current() -> None:
    """Make it again with `sat-train check --schema > configs/schema.json`."""
    with open("configs/schema.json", encoding="utf-8") as file:
        assert file.read() == render_json_schema()


def test_sat_namespace_holds_the_sections(load: Load) -> None:
    args = build_sat_args(load())
    assert isinstance(args, argparse.Namespace)
    assert (args.hidden_size, args.num_layers, args.train_iters, args.model_parallel_size) == (
        128,
        6,
        1000,
        1,
    )
    assert args.model_config["network_config"]["params"]["num_layers"] == 6
    assert args.deepspeed_config["gradient_clipping"] == 0.1


def test_the_pages_name_every_slot_and_every_part() -> None:
    extend = Path("docs/extend_reference.md").read_text(encoding="utf-8")
    slots = extend[extend.index("## What can be registered") :]
    assert sorted(re.findall(r"^\| `(\w+)` \|", slots, re.MULTILINE)) == slot_names()
    config = Path("docs/config.md").read_text(encoding="utf-8")
    names = [name for slot in slot_names() for name in parts_of(slot)]
    assert [name for name in names if f"`{name}`" not in config + extend] == []

"""Keys of CogVideo's files that can hold one value here: accepted, checked, and no part of the schema."""

from __future__ import annotations

import json

import pytest

from sat_train.config import load_run_config
from sat_train.config.catalog import all_keys
from sat_train.config.explain import explain_key
from sat_train.config.fixed_keys import FIXED, WITHOUT_SETTINGS
from sat_train.errors import ConfigError


def load(*words: str):
    return load_run_config(["configs/sft.yaml"], words, check_paths=False)


@pytest.mark.parametrize("which", [0, -1], ids=["our name", "CogVideo's name"])
def test_all_of_them_at_once_change_nothing(which: int) -> None:
    own = {"data.target": 0}  # CogVideo's data set brings a setting with it
    words = [f"{path}={json.dumps(allowed[own.get(path, which)])}" for path, allowed in FIXED.items()]
    config = load(*words)
    # a schedule that is named is one of its own, with its defaults
    repeated = "model.loss_fn_config.params.sigma_sampler_config.params.discretization_config"
    same = load(f"{repeated}={{}}", "model.sampler_config.params.discretization_config={}")
    assert same.tree() == config.tree()
    assert not set(FIXED) & config.sources.keys()
    assert not [note for note in config.notes if "older" in note]


@pytest.mark.parametrize("path", FIXED)
def test_another_value_is_refused_by_name(path: str) -> None:
    expected = str(FIXED[path][0])
    with pytest.raises(ConfigError) as caught:
        load(f"{path}=Other")
    (fault,) = [fault for fault in caught.value.faults if fault.path == path]
    assert (fault.value, fault.expected.lower(), fault.source) == ("Other", expected.lower(), "command line")
    assert all(fault.path == path for fault in caught.value.faults)


def test_numbers_are_no_truth_values() -> None:
    with pytest.raises(ConfigError, match=r"noised_image_all_concat = 0: expected false"):
        load("model.noised_image_all_concat=0")
    with pytest.raises(ConfigError, match=r"double_z = 1: expected true"):
        load("model.first_stage_config.params.encoder_config.params.double_z=1")


def test_a_right_value_later_mends_a_wrong_one() -> None:
    target = "model.network_config.params.modules.adaln_layer_config.target"
    assert load(f"{target}=Other", f"{target}=AdaLN").spec == load().spec


def test_groups_without_settings_may_be_named_and_hold_nothing() -> None:
    groups = [f"{group}={{params: {{}}}}" for group in WITHOUT_SETTINGS]
    assert load(*groups).tree() == load().tree()
    for group in WITHOUT_SETTINGS:
        with pytest.raises(ConfigError, match=f"{group}.*expected a key that exists"):
            load(f"{group}.params.strength=2")


def test_the_schema_has_none_of_them() -> None:
    assert not all_keys().keys() & {*FIXED, *WITHOUT_SETTINGS}


def test_they_are_explained() -> None:
    text = explain_key("model.network_config.params.modules.adaln_layer_config.target", None)
    assert text.endswith("A key of older files: it can only hold AdaLN.")

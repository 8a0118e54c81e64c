"""Laws of every key of the schema: a value is kept exactly or refused by name, never coerced or lost."""

from __future__ import annotations

import json

import pytest
from pydantic_core import PydanticUndefined

from sat_train.config import load_run_config
from sat_train.config.aliases import SAME, get_value
from sat_train.config.catalog import Key, all_keys, pattern_of
from sat_train.config.layers import Layer, merge_layers
from sat_train.config.loading import leaves
from sat_train.config.run import Sections
from sat_train.config.run_rules import SAMPLING_ONLY, TRAINING_ONLY
from sat_train.config.schema.args import ArgsConfig
from sat_train.config.section_check import validate
from sat_train.config.yaml_text import parse_value
from sat_train.errors import ConfigError, Fault

GIVEN = ("true", "1", "0", "'1'", "1.5", "1e30", "[]", "[true]", "{a: 1}", "null")
NEVER = (".inf", "-.inf", ".nan", "1" + "0" * 30, "1" * 5000, "[.inf]", '"a\\0b"', '"\\ud800"')
# The few notations that stand for another value, each documented in the schema.
NOTATIONS = {
    "one text for a list of one": lambda value, kept: isinstance(value, str) and kept == [value],
    "one number for a list of one": lambda value, kept: type(value) in (int, float) and kept == [value],
    "a mapping for pairs": lambda value, kept: kept == [list(pair) for pair in value.items()],
    "a whole float": lambda value, kept: isinstance(value, float) and type(kept) is int and value == kept,
    "one number for a patch": lambda value, kept: type(value) is int and kept == [1, value, value],
    "off is false in YAML": lambda value, kept: value is False and kept == "off",
    "on is true in YAML": lambda value, kept: value is True and kept == "on",
    "all is recomputed in SAT's files": lambda value, kept: value is True and kept == "full",
    "an aspect is a number in YAML": lambda value, kept: kept == [f"{n // 60}:{n % 60}" for n in value],
}


@pytest.fixture(scope="module")
def tree() -> dict[str, object]:
    """A complete configuration, with the groups that are null by default."""
    words = ["data.params.buckets={}", "model.not_trainable_prefixes=[all]", "args.eval_interval=500"]
    return load_run_config(["configs/lora.yaml"], words, check_paths=False).tree()


def settings() -> list[Key]:
    return [key for key in all_keys().values() if not key.is_section and not key.path.endswith(".target")]


def given(tree: dict[str, object], path: str, value: object) -> tuple[Sections | None, list[Fault]]:
    merged = merge_layers([Layer("base", tree, {}), Layer("given", nested(path, value), {})])
    faults: list[Fault] = []
    return validate(merged, dict, faults), faults


def nested(path: str, value: object) -> dict[str, object]:
    for part in reversed(path.replace("*", "0").split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("text", GIVEN)
def test_what_is_given_is_kept_exactly_or_refused_by_name(text: str, tree: dict[str, object]) -> None:
    value = parse_value(text)
    for key in settings():
        path = key.path.replace("*", "0")
        before = get_value(tree, path)
        if before is PydanticUndefined:
            continue
        sections, faults = given(json.loads(json.dumps(tree)), path, value)
        if faults:
            assert all(fault.path == path or fault.path.startswith(f"{path}.") for fault in faults), (
                path,
                faults,
            )
            continue
        assert sections is not None
        kept = get_value(sections.model_dump(mode="json"), path)
        same = kept == value and isinstance(kept, bool) == isinstance(value, bool)
        assert same or any(is_notation(value, kept) for is_notation in map(safely, NOTATIONS.values())), (
            path,
            kept,
        )


def safely(notation):
    def check(value, kept):
        try:
            return notation(value, kept)
        except (TypeError, AttributeError):
            return False

    return check


@pytest.mark.parametrize("text", NEVER)
@pytest.mark.parametrize(
    "path", ["args.lr", "args.seed", "args.load", "deepspeed.fp16.loss_scale", "args.train_data"]
)
def test_what_cannot_be_written_down_is_refused_for_every_type(path: str, text: str) -> None:
    word = "args.load=a\0b" if path == "args.load" else f"{path}={text}"
    with pytest.raises(ConfigError) as caught:
        load_run_config(["configs/sft.yaml"], [word], check_paths=False)
    assert str(caught.value.faults[0].path).startswith(path)
    assert len(str(caught.value)) < 1000


NOT_NULL = [
    key.path for key in all_keys().values() if key.is_section and not key.is_nullable and "*" not in key.path
]


@pytest.mark.parametrize(
    "path", [path for path in NOT_NULL if path != "model" and not path.startswith("model.")]
)
def test_null_takes_a_section_back_to_its_defaults(path: str, tree: dict[str, object]) -> None:
    sections, faults = given(json.loads(json.dumps(tree)), path, None)
    if faults:  # it has settings without defaults
        assert all(fault.path.startswith(path) for fault in faults)
        return
    assert sections is not None
    values = leaves(sections.model_dump(mode="json"))
    for key in settings():
        if key.path.startswith(f"{path}.") and "*" not in key.path:
            default = json.loads(json.dumps(key.default if key.default != () else []))
            assert values.get(key.path, default) == default, key.path


@pytest.mark.parametrize("section", ["args", "deepspeed"])
def test_null_on_the_command_line_undoes_the_files_and_later_words_count(section: str) -> None:
    words = [f"{section}=null", "args.train_iters=3", "args.train_data=[x]"]
    config = load_run_config(["configs/sft.yaml"], words, check_paths=False)
    if section == "args":
        assert (config.args.train_iters, config.args.lr, config.sources["args.lr"]) == (3, 1e-4, "default")
    else:
        assert config.deepspeed.optimizer.type == "AdamW"
    with pytest.raises(ConfigError, match="a section with params"):
        load_run_config(["configs/sft.yaml"], ["data=null"], check_paths=False)


def test_a_blank_section_in_a_file_changes_nothing(tmp_path) -> None:
    (tmp_path / "blank.yaml").write_text("args:\ndeepspeed:\n  optimizer:\ndata:\n  params:\n")
    config = load_run_config(["configs/sft.yaml", tmp_path / "blank.yaml"], check_paths=False)
    assert config.digest() == load_run_config(["configs/sft.yaml"], check_paths=False).digest()


@pytest.mark.parametrize("name", sorted(SAMPLING_ONLY))
def test_training_refuses_what_only_sampling_reads(name: str) -> None:
    value = {"input_type": "txt", "ema": "true"}.get(name, "x")
    words = [f"args.{name}={value}", "data.cache_dir=c"]
    says = rf"args\.{name} = .*no such setting: training does not read it"
    for purpose in ("train", "precompute"):
        with pytest.raises(ConfigError, match=says):
            load_run_config(["configs/sft.yaml"], words, purpose=purpose, check_paths=False)


def test_sampling_refuses_words_that_only_training_reads() -> None:
    assert ArgsConfig.model_fields.keys() >= TRAINING_ONLY | SAMPLING_ONLY
    assert not TRAINING_ONLY & SAMPLING_ONLY
    words = ["--prompt", "x", "args.lr=0.1"]
    with pytest.raises(
        ConfigError, match=r"args\.lr = 0\.1: expected no such setting: sampling does not read it"
    ):
        load_run_config(["configs/sample.yaml"], words, purpose="sample", check_paths=False)
    config = load_run_config(
        ["configs/sft.yaml", "configs/sample.yaml"], words[:2], purpose="sample", check_paths=False
    )
    assert config.args.lr == 1e-5, "a file may describe both"


def test_every_pattern_of_a_path_knows_its_places() -> None:
    assert pattern_of("emb_models.²") == "emb_models.²"
    assert pattern_of("emb_models.0.ucg_rate") == "emb_models.*.ucg_rate"
    assert SAME.keys() <= all_keys().keys()

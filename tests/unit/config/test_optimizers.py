"""Optimizers are refused by name where they cannot be right, with the way out, before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sat_train.config import RunConfig, load_run_config
from sat_train.config.extensions import load_extensions
from sat_train.config.parts.registry import parts_of
from sat_train.errors import ConfigError

WHOLE = ["AdamW8bit", "Adafactor", "CAME", "Muon", "Prodigy"]


def load(*words: str) -> RunConfig:
    return load_run_config(["configs/sft.yaml"], list(words), check_paths=False)


@pytest.mark.parametrize("name", sorted(parts_of("optimizer")))
def test_whole_weights_are_not_divided(name: str) -> None:
    for stage in (0, 1, 2):
        load(f"deepspeed.optimizer.type={name}", f"args.zero_stage={stage}")
    for word, says in (
        (
            "args.zero_stage=3",
            rf"args\.zero_stage = 3: expected 1 or 2, as {name} steps whole weights; .*AdamW",
        ),
        ("args.model_parallel_size=2", rf"args\.model_parallel_size = 2: expected 1, as {name} steps whole"),
    ):
        words = [f"deepspeed.optimizer.type={name}", word]
        if name not in WHOLE:
            load(*words)
            continue
        with pytest.raises(ConfigError, match=says):
            load(*words)


def test_an_optimizer_from_outside_says_that_it_needs_whole_weights(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(
        '"""An optimizer that needs rows."""\n\n'
        "from sat_train.parts import OptimizerParams, part\n\n\n"
        '@part("optimizer", "Rows", build=":build")\n'
        'class RowsParams(OptimizerParams):\n    """Needs rows."""\n\n    elementwise = False\n'
    )
    words = ["--extension", str(tmp_path / "rows.py"), "deepspeed.optimizer.type=Rows"]
    load(*words, "args.zero_stage=2")
    with pytest.raises(ConfigError, match=r"args\.zero_stage = 3: expected 1 or 2, as Rows steps whole"):
        load(*words, "args.zero_stage=3")
    load_extensions([])


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # Python's own mark of a package that is not there
    load("deepspeed.optimizer.type=AdamW")
    with pytest.raises(ConfigError, match=r"type = AdamW8bit: .*needs `pip install bitsandbytes`"):
        load("deepspeed.optimizer.type=AdamW8bit")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.freeze=[(a]"], r"model\.freeze\.0 = \(a: expected a regular expression"),
        (
            ["model.train.patches={match: a**, lr: 2}"],
            r"model\.train\.patches\.match\.0 = a\*\*: expected a reg",
        ),
        (
            ["model.train.patches={match: proj, lr: 0}"],
            r"model\.train\.patches\.lr = 0.*: expected a number > 0",
        ),
        (["model.train.patches={mach: proj}"], r"model\.train\.patches\.mach .*did you mean 'match'"),
        (
            ["model.train.patches={match: proj, lr: 2}", "deepspeed.optimizer.type=Prodigy"],
            r"model\.train\.patches\.lr = 2\.0: expected 1: Prodigy has one rate for all weights",
        ),
    ],
)
def test_patterns_of_weights_are_checked(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(*words)


def test_lora_plus_is_a_rate_of_b_alone() -> None:
    lora = "model.network_config.params.modules.lora_config.params.loraplus_lr_ratio=16"
    config = load_run_config(["configs/lora.yaml"], [lora], check_paths=False)
    assert config.spec.adapter is not None
    assert config.spec.adapter.params.lr_factors == {"matrix_B": 16.0}
    words = [lora, "deepspeed.optimizer.type=Prodigy"]
    with pytest.raises(ConfigError, match=r"\(matrix_B\) = 16\.0: expected 1: Prodigy has one rate"):
        load_run_config(["configs/lora.yaml"], words, check_paths=False)


def test_settings_of_the_same_name_and_another_type_are_not_taken_over() -> None:
    """The two betas of sft.yaml are Adam's, and so is its epsilon."""
    params = load("deepspeed.optimizer.type=CAME").deepspeed.optimizer.params
    assert (params.betas, params.eps) == ((0.9, 0.95, 0.9999), (1e-30, 1e-16))  # type: ignore[attr-defined]
    params = load("deepspeed.optimizer.type=Prodigy").deepspeed.optimizer.params
    assert (params.betas, params.eps) == ((0.9, 0.95), 1e-8)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"params\.betas = .*: expected three numbers from 0 to below 1"):
        load("deepspeed.optimizer.type=CAME", "deepspeed.optimizer.params.betas=[0.9,0.95,1.5]")

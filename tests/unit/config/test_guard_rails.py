"""Guard rails: quiet for what is shipped, loud for what is known to waste a run, and listed in the docs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest
import torch

from sat_train.config import ModelSpec, RunConfig, guard_rails, load_run_config
from sat_train.config.facts import RunFacts
from sat_train.config.parts.adapter_parts import find_adapter_tensor
from sat_train.config.rule import Purpose, Rule
from sat_train.config.rules import all_rules, warnings_of_run
from sat_train.config.run_warnings import RUN_WARNINGS
from sat_train.distributed.processes import start_single_process, stop_processes
from sat_train.errors import ConfigError
from sat_train.models.build import build_dit
from sat_train.models.trainable import select_trainable

RAILS = {rule.name: rule for rule in all_rules() if rule.check.__module__ == guard_rails.__name__}
MODELS = sorted(Path("configs/model").glob("*.yaml"))
RECIPES = sorted([*Path("configs/recipe").glob("*.yaml"), *Path("configs/parallel").glob("*.yaml")])
ALPHA = "model.network_config.params.modules.lora_config.params.lora_alpha"
RANK = "model.network_config.params.modules.lora_config.params.r"
ONE_SIZE = ("cogvideox_2b", "cogvideox_5b_i2v", "cogvideox_tiny_i2v")  # models with position tables


def makes_sense(model: Path, preset: str, recipe: Path) -> bool:
    if recipe.stem == "buckets":
        return model.stem not in ONE_SIZE
    if recipe.stem == "image_to_video":  # trains a network from random weights
        return preset == "sft" and not model.stem.endswith("i2v")
    if recipe.stem.startswith("low_vram"):
        return preset == "lora"
    kind = recipe.stem.rpartition("_")[2]
    return kind not in ("sft", "lora") or kind == preset


BUILT: set[tuple[str, ...]] = set()
COMBINATIONS = [
    (model, preset, recipe)
    for model in MODELS
    for preset in ("sft", "lora")
    for recipe in RECIPES
    if makes_sense(model, preset, recipe)
]


def load(
    model: str | Path, preset: str, *words: str, behind: tuple[Path, ...] = (), purpose: Purpose = "train"
) -> RunConfig:
    model = model if isinstance(model, Path) else f"configs/model/cogvideox_{model}.yaml"
    files = [model, f"configs/{preset}.yaml", *behind]
    words = ("args.train_data=[clips]", *words)
    return load_run_config(files, words, purpose=purpose, check_paths=False)


def warned(notes: Sequence[str]) -> dict[str, str]:
    """Warnings by the name of their guard rail."""
    warnings = {}
    for note in notes:
        if match := re.search(r"args\.silence=\[(\w+)\] hides this\)$", note):
            warnings[match[1]] = note
    return warnings


@dataclass(frozen=True)
class Case:
    """Words and facts that break a guard rail, and nearly the same ones that do not."""

    name: str
    breaking: tuple[str, ...]
    clean: tuple[str, ...]
    says: str
    model: str = "5b"
    preset: str = "sft"
    purpose: Purpose = "train"
    facts: RunFacts = field(default_factory=RunFacts)
    clean_facts: RunFacts = field(default_factory=RunFacts)

    def found(self, words: tuple[str, ...], facts: RunFacts) -> dict[str, str]:
        """What the guard rails say, by name; of a refused configuration, all of it."""
        try:
            config = load(self.model, self.preset, *words, purpose=self.purpose)
        except ConfigError as error:
            return {self.name: str(error)}
        return {**warned(config.notes), **warned(warnings_of_run(config, facts))}


LORA = "model.network_config.params.modules.lora_config.params"
BETAS = "deepspeed.optimizer.params.betas"
CASES = [
    Case(
        "whole_warmup",
        ("args.warmup=1000",),
        ("args.warmup=999",),
        r"args\.warmup = 1000\.0: expected fewer steps than args\.train_iters = 1000",
    ),
    Case(
        "whole_warmup", ("args.warmup=1.5",), ("args.warmup=0.5",), r"args\.warmup = 1\.5: expected a whole"
    ),
    Case(
        "validation_lines_up_with_saves",
        ("args.eval_interval=300", "args.valid_video_interval=null"),
        ("args.eval_interval=250", "args.valid_video_interval=null"),
        r"args\.eval_interval = 300: expected a multiple of args\.save_interval = 250, e\.g\. 250",
    ),
    Case(
        "validated_weights_are_saved",
        ("args.eval_interval=100", "args.save_interval=500", "args.valid_video_interval=null"),
        ("args.eval_interval=500", "args.save_interval=100"),
        "args.eval_interval = 100: expected a multiple of args.save_interval = 500",
    ),
    Case(
        "lora_rate_fits_its_scale",
        ("args.lr=2e-5",),
        ("args.lr=5e-4",),
        "args.lr = 2e-05: expected 5e-04 to 1e-03 with alpha 1 and rank 128: .* 1.6e-07 a LoRA hardly learns",
        preset="lora",
    ),
    Case(
        "lora_rate_fits_its_scale",
        (f"{ALPHA}=128",),
        (f"{ALPHA}=96", f"{RANK}=96", "args.lr=1e-4"),
        "args.lr = 0.001: expected 4e-06 to 1e-05 with alpha 128 and rank 128: .* destroy the model",
        preset="lora",
    ),
    Case(
        "prodigy_rate_is_a_factor",
        ("deepspeed.optimizer.type=Prodigy", "args.lr=0.1"),
        ("deepspeed.optimizer.type=Prodigy", "args.lr=0.2"),
        r"args\.lr = 0\.1: expected about 1\.0: .*converges extremely slowly",
    ),
    Case("sft_rate_is_low", ("args.lr=6e-5",), ("args.lr=5e-5",), "args.lr = 6e-05: expected 1e-5"),
    Case(
        "sft_rate_is_low",
        ("args.lr=1e-4", "args.clip_grad=1.0"),
        ("args.lr=1e-4", "args.mode=pretrain"),
        "args.lr = 0.0001: expected 1e-5",
    ),
    Case(
        "second_moment_is_recent",
        (f"{BETAS}=[0.9,0.999]",),
        (f"{BETAS}=[0.9,0.99]",),
        rf"{BETAS} = \[0.9, 0.999\]: expected \[0.9, 0.95\]",
    ),
    Case(
        "gradients_are_clipped",
        ("args.clip_grad=0",),
        ("args.clip_grad=0.1",),
        "args.clip_grad = 0.0: expected 0.1 with SAT's learning rates, 1.0 with",
    ),
    Case(
        "sat_rates_clip_at_a_tenth",
        ("args.clip_grad=1.0",),
        ("args.clip_grad=1.0", "args.lr=2e-5"),
        "args.clip_grad = 1.0: expected 0.1, which belongs to SAT's lr = 1e-05",
    ),
    Case(
        "sat_rates_clip_at_a_tenth",
        ("args.clip_grad=1.0", "args.lr=5e-4"),
        ("args.clip_grad=0.5",),
        "args.clip_grad = 1.0: expected 0.1, which belongs to SAT's lr = 0.0005",
        preset="lora",
    ),
    Case(
        "steps_are_enough",
        ("args.train_iters=499",),
        ("args.train_iters=500",),
        "args.train_iters = 499: expected 500 or more: SFT",
    ),
    Case(
        "steps_are_enough",
        ("args.train_iters=999",),
        ("args.train_iters=null", "args.epochs=3"),
        "args.train_iters = 999: expected 1000 or more: LoRA",
        preset="lora",
    ),
    Case(
        "zero3_samples_no_videos",
        ("args.zero_stage=3",),
        ("args.zero_stage=3", "args.valid_video_interval=null"),
        "args.valid_video_interval = 500: expected null with args.zero_stage = 3",
    ),
    Case(
        "precision_is_that_of_the_release",
        ("args.fp16=true", "args.bf16=false"),
        ("args.bf16=false",),
        "args.fp16 = true: expected args.bf16=true instead",
    ),
    Case(
        "precision_is_that_of_the_release",
        ("args.fp16=false", "args.bf16=true"),
        ("args.fp16=true",),
        "args.bf16 = true: expected args.fp16=true instead",
        model="2b",
    ),
    Case(
        "timeout_outlasts_encoding",
        ("args.distributed_timeout_minutes=29", "data.cache=fill", "data.cache_dir=cache"),
        ("args.distributed_timeout_minutes=29", "data.cache=require", "data.cache_dir=cache"),
        "args.distributed_timeout_minutes = 29.0: expected 30 or more",
    ),
    Case(
        "timeout_outlasts_encoding",
        ("args.distributed_timeout_minutes=29", "data.cache_dir=cache"),
        ("args.distributed_timeout_minutes=30", "data.cache_dir=cache"),
        "args.distributed_timeout_minutes = 29.0: expected 30 or more",
        purpose="precompute",
    ),
    Case(
        "average_leaves_the_start",
        ("args.ema_decay=0.9999",),
        ("args.ema_decay=0.9999", "args.train_iters=30000"),
        "args.ema_decay = 0.9999: expected at most 0.997 for 1000 steps: 90% of the average",
    ),
    Case(
        "sft_takes_enough_clips",
        ("args.batch_size=3",),
        ("args.batch_size=4",),
        r"args\.batch_size = 3: expected 16 clips or more in a step, which has 12, e\.g\. with .*steps = 2 ",
        facts=RunFacts(data_ranks=4),
        clean_facts=RunFacts(data_ranks=4),
    ),
    Case(
        "rate_is_not_scaled_with_the_batch",
        ("args.lr=4e-5",),
        ("args.lr=2e-5",),
        r"args\.lr = 4e-05: expected 1e-5, or 2e-5 for 64 clips in a step instead of 16",
        facts=RunFacts(data_ranks=32),
        clean_facts=RunFacts(data_ranks=32),
    ),
    Case(
        "rate_is_not_scaled_with_the_batch",
        ("args.lr=4e-3",),
        ("args.lr=4e-3",),
        r"args\.lr = 0\.004: expected 0\.001, or 0\.002 for 64 clips",
        preset="lora",
        facts=RunFacts(data_ranks=32),
        clean_facts=RunFacts(data_ranks=30),
    ),
    Case(
        "sft_videos_fit_the_card",
        (),
        ("args.valid_video_interval=null",),
        r"args\.valid_video_interval = 500: expected null on a card of 24 GiB",
        model="2b",
        facts=RunFacts(data_ranks=8, card_gib=24.0),
        clean_facts=RunFacts(data_ranks=8, card_gib=24.0),
    ),
    Case(
        "sft_videos_fit_the_card",
        (),
        (),
        r"expected null on a card of 80 GiB: weights, optimizer and encoders take 93 GiB",
        facts=RunFacts(data_ranks=1, card_gib=80.0),
        clean_facts=RunFacts(data_ranks=8, card_gib=80.0),
    ),
    Case(
        "captions_fit_the_text_encoder",
        (),
        (),
        r"emb_models\.0\.params\.max_length = 226: expected captions of at most 226 tokens: 3% are longer",
        facts=RunFacts(long_captions=0.03),
        clean_facts=RunFacts(long_captions=0.01),
    ),
    Case(
        "loaded_adapters_keep_their_scale",
        (f"{LORA}.alpha_pattern={{dense: 2}}",),
        (f"{LORA}.alpha_pattern={{dense: 64}}",),
        r"lora_alpha = 1\.0: expected alpha / r = 0\.0078125 or 0\.5, at which .* not 0\.0078125 or 0\.0156",
        preset="lora",
        facts=RunFacts(adapter_scales=(1 / 128, 0.5)),
        clean_facts=RunFacts(adapter_scales=(1 / 128, 0.5)),
    ),
]
IDS = [f"{case.name}-{case.preset}-{index}" for index, case in enumerate(CASES)]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_one_that_is_broken_says_what_why_and_where_and_a_warning_can_be_silenced(case: Case) -> None:
    rail = RAILS[case.name]
    note = case.found(case.breaking, case.facts)[case.name]
    assert re.search(case.says, note)
    assert f"({rail.source}" in note
    assert case.name not in case.found(case.clean, case.clean_facts)
    silenced = case.found((*case.breaking, f"args.silence=[{case.name}]"), case.facts)
    assert (case.name in silenced) == (rail.severity == "error")


def test_every_guard_rail_has_a_case_and_a_source() -> None:
    assert {case.name for case in CASES} == RAILS.keys()
    assert all(rule.source.startswith("https://") for rule in RAILS.values())


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", ["sft", "lora"])
def test_presets_are_clean(model: Path, preset: str) -> None:
    assert warned(load(model, preset).notes) == {}


@pytest.mark.parametrize(
    ("model", "preset", "recipe"), COMBINATIONS, ids=lambda value: getattr(value, "stem", value)
)
def test_every_recipe_with_every_model_is_clean_and_builds(model: Path, preset: str, recipe: Path) -> None:
    config = load(model, preset, behind=(recipe,))
    facts = RunFacts(data_ranks=8, card_gib=80.0, long_captions=0.0)
    assert warned((*config.notes, *warnings_of_run(config, facts))) == {}
    build(replace(config.spec, layers=2), config.model.not_trainable_prefixes)


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    start_single_process()
    yield
    stop_processes()
    BUILT.clear()


def build(spec: ModelSpec, frozen: Sequence[str]) -> None:
    """Builds a network without memory, and selects what trains; each architecture once."""
    key = (*(str(getattr(spec, field.name)) for field in fields(spec)), *frozen)
    if key not in BUILT:
        dit = build_dit(spec, device="meta", dtype=torch.float32, initialize=False)
        select_trainable(dit, not_trainable_prefixes=frozen)
        trained = [name for name, parameter in dit.named_parameters() if parameter.requires_grad]
        assert trained
        assert all(map(find_adapter_tensor, trained)) == (spec.adapter is not None)
        BUILT.add(key)


def test_the_embedded_model_may_run_a_few_steps_at_any_rate() -> None:
    words = ["args.train_iters=3", "args.lr=0.01"]
    assert warned(load("tiny", "sft", *words).notes) == {}


def test_parts_and_sampling_are_not_judged() -> None:
    """A model file alone has the optimizer's default betas, but nobody trains with it alone."""
    for model in MODELS:
        config = load_run_config([model], [], purpose="check", check_paths=False)
        assert warned(config.notes) == {}
    words = ["args.train_iters=9", "--prompt", "a cat"]
    config = load_run_config(["configs/sample.yaml"], words[1:], purpose="sample", check_paths=False)
    assert warned(config.notes) == {}


@pytest.mark.parametrize(("recipe", "rate"), [("sat_lora", 1e-3 / 128), ("diffusers_lora", 1e-5)])
def test_lora_recipes_have_the_effective_rate_of_their_source(recipe: str, rate: float) -> None:
    config = load("5b", "lora", behind=(Path(f"configs/recipe/{recipe}.yaml"),))
    scales = config.spec.adapter.params.scales(config.spec.linear_layers())
    assert [config.args.lr * scale for scale in scales] == pytest.approx([rate])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((f"{LORA}.use_rslora=true", "args.lr=1e-3"), ""),  # 1e-3 / sqrt(128) is 8.8e-5
        ((f"{LORA}.use_rslora=true", "args.lr=2e-3"), r"scaled by alpha / sqrt\(r\), and at .* 1\.8e-04"),
        ((f"{LORA}.rank_pattern={{dense: 4}}", "args.lr=1e-3"), r"an effective rate of 2\.5e-04"),
        ((f"{LORA}.alpha_pattern={{dense: 0.01}}", "args.lr=1e-3"), r"rate of 7\.8e-08 a LoRA hardly learns"),
        ((f"{LORA}.alpha_pattern={{dense: 4}}", "args.lr=1e-3"), ""),
    ],
)
def test_the_effective_rate_is_that_of_the_most_extreme_layer(words: tuple[str, ...], says: str) -> None:
    found = warned(load("5b", "lora", *words).notes).get("lora_rate_fits_its_scale", "")
    assert re.search(says, found) if says else not found


def documented(rule: Rule) -> str:
    """The row of a guard rail in docs/recipes.md, without its links' labels."""
    silence = f"`args.silence=[{rule.name}]`" if rule.severity == "warning" else "-"
    return f"| `{rule.name}` | {rule.severity} | {rule.check.__doc__} | {rule.source or '-'} | {silence} |"


def test_the_docs_list_every_guard_rail() -> None:
    text = Path("docs/recipes.md").read_text(encoding="utf-8")
    table = re.search(r"\| name \| severity \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text)
    rows = re.sub(r"\[[^\]]+\]\((https:[^)]+)\)", r"\1", table[1]).splitlines()
    assert rows == [documented(rule) for rule in RAILS.values()]
    text = Path("docs/validation.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` | {finds} |" in text for name, finds in RUN_WARNINGS.items())
    load("5b", "sft", f"args.silence=[{', '.join(RUN_WARNINGS)}]")


def test_a_silenced_name_that_no_guard_rail_has_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"args\.silence\.0 = step_are_enough: .*did you mean 'steps_are_enough'"
    ):
        load("5b", "sft", "args.silence=[step_are_enough]")

"""Every shipped YAML is found by looking, loads, says how to use it, and builds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sat_train.config import RunConfig, load_run_config
from sat_train.config.loading import leaves
from sat_train.distributed.processes import start_single_process, stop_processes
from sat_train.models.build import build_dit

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
MODELS = [path for path in FILES if path.parent.name == "model"]
# Millions of weights in the transformer, as released.
RELEASED = {
    "cogvideox_2b": 1693.8,
    "cogvideox_5b": 5570.3,
    "cogvideox_5b_i2v": 5570.5,
    "cogvideox1.5_5b": 5570.7,
    "cogvideox1.5_5b_i2v": 5571.6,
}


def load(*paths: Path) -> RunConfig:
    return load_run_config(paths, purpose="check", check_paths=False)


def named(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_loads_alone(path: Path) -> None:
    load(path)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_loads_behind_sft(path: Path) -> None:
    load(CONFIGS / "sft.yaml", path)


@pytest.mark.parametrize("model", MODELS, ids=named)
@pytest.mark.parametrize("what", ["sft", "lora"])
def test_each_model_with_each_way_to_train(model: Path, what: str) -> None:
    config = load(model, CONFIGS / f"{what}.yaml")
    assert (config.spec.adapter is not None) == (what == "lora")
    assert config.args.fp16 == ("2b" in model.name)
    assert config.args.bf16 == ("5b" in model.name)


@pytest.mark.parametrize("path", FILES, ids=named)
def test_opens_with_what_hardware_and_command(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "Hardware" in head
    assert re.search(
        r"(sat-train (train|sample)|torchrun .*launch/(train_video|sample_video)\.py) --base ", head
    )
    for mentioned in re.findall(r"configs/[\w./]+\.yaml", head):
        assert (CONFIGS.parent / mentioned).is_file(), mentioned


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "recipe"], ids=named)
def test_a_recipe_opens_with_the_source_of_its_numbers_and_when_to_use_it(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    subjects = re.findall(r"^# (\w+) {3,}\S", head, re.MULTILINE)
    assert subjects[:4] == ["Source", "When", "Hardware", "Use"]


@pytest.mark.parametrize("path", FILES, ids=named)
def test_says_where_the_schema_is(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    (schema,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", first)
    assert (path.parent / schema).resolve() == CONFIGS / "schema.json"


def test_sft_is_as_promised() -> None:
    config = load(CONFIGS / "sft.yaml")
    optimizer = config.deepspeed.optimizer
    assert (config.args.mode, config.args.train_iters, config.args.lr) == ("finetune", 1000, 1e-5)
    assert (optimizer.type, optimizer.params.betas, optimizer.params.eps) == ("Adam", (0.9, 0.95), 1e-8)
    assert (config.args.weight_decay, config.args.clip_grad, config.args.zero_stage) == (1e-4, 0.1, 2)
    assert config.args.eval_interval is not None
    assert config.args.eval_interval % config.args.save_interval == 0


def test_lora_is_sft_but_for_what_it_says() -> None:
    sft, lora = (leaves(load(CONFIGS / name).tree()) for name in ("sft.yaml", "lora.yaml"))
    changed = {path for path in sft.keys() | lora.keys() if sft.get(path) != lora.get(path)}
    adapter = "model.network_config.params.modules.lora_config"
    assert {path for path in changed if not path.startswith(adapter)} == {
        "args.experiment_name",
        "args.lr",
        "deepspeed.optimizer.params.lr",
        "model.not_trainable_prefixes",
    }
    assert (lora[f"{adapter}.params.r"], lora[f"{adapter}.params.lora_alpha"], lora["args.lr"]) == (
        128,
        1.0,
        1e-3,
    )
    assert lora["model.not_trainable_prefixes"] == ["all"]


def test_schema_symbolic_link_ships_the_configs() -> None:
    """The package holds no second copy: what is installed is this folder."""
    assert (CONFIGS.parent / "sat_train/configs").resolve() == CONFIGS


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> None:
    start_single_process()
    yield
    stop_processes()


@pytest.mark.parametrize("model", MODELS, ids=named)
def test_builds_without_memory(model: Path) -> None:
    dit = build_dit(load(model).spec, device="meta", dtype=torch.float32, initialize=False)
    assert all(parameter.is_meta for parameter in dit.parameters())
    if model.stem in RELEASED:
        millions = sum(p.numel() for name, p in dit.named_parameters() if "pos_embed" not in name) / 1e6
        assert millions == pytest.approx(RELEASED[model.stem], abs=0.1)

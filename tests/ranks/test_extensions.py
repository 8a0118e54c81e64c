"""Parts from outside the package train, resume and are named where they are missing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from sat_train.checkpoint.fragments import SavedFragments, read_fragments
from sat_train.checkpoint.layout import CLIENT_STATE
from sat_train.checkpoint.manifest import read_manifest
from sat_train.cli.convert import main as convert
from sat_train.config import load_run_config
from sat_train.config.reading import RESOLVED
from sat_train.distributed.processes import stop_processes
from sat_train.errors import CheckpointError, ConfigError
from sat_train.interchange.adapters import read_lora
from sat_train.interchange.module_files import read_module_file
from sat_train.testing.pool import FailedOnRank
from sat_train.training.callbacks.metrics_file import read_metrics
from sat_train.training.resume import find_resumed
from tests.ranks.extensions import write_extensions
from tests.ranks.micro import micro_run, run_directory, train_micro, write_micro

pytestmark = pytest.mark.ranks

CONSTANT = ["args.lr=1e-3", "args.lr_decay_style=constant", "args.warmup=0", "args.save_interval=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("extensions")
    write_micro(path)
    write_extensions(path)
    stop_processes()
    return path


def lion(folder: Path, name: str, steps: int, *words: str) -> list[str]:
    choice = ["deepspeed.optimizer.type=Lion", f"args.experiment_name={name}", f"args.train_iters={steps}"]
    return ["--extension", str(folder / "lion"), *choice, *CONSTANT, *words]


def losses(folder: Path, name: str) -> list[float]:
    records = read_metrics(run_directory(folder, name) / "metrics.jsonl")
    return [record["loss"] for record in records if "loss" in record]  # not those of validation


def state_of(step: Path) -> SavedFragments:
    return read_fragments(step, read_manifest(step), model_rank=0, model_size=1)


@pytest.fixture(scope="module")
def straight(rank_pool, folder) -> Path:
    rank_pool(1)(train_micro, folder, lion(folder, "straight", 4))
    return run_directory(folder, "straight")


def test_an_optimizer_from_outside_trains_and_its_state_is_saved(folder, straight):
    assert len(set(losses(folder, "straight"))) == 4
    saved = state_of(straight / "4")
    assert {kind for name in saved.shapes for kind in saved.kinds(name)} == {"master", "exp_avg"}
    before = read_fragments(straight / "2", read_manifest(straight / "2"), model_rank=0, model_size=1)
    moved = [
        (saved.whole("master")[name][:] - before.whole("master")[name][:]).abs().max()
        for name in saved.shapes
    ]
    # Lion moves each weight by lr in each step, but for the decay
    assert max(moved) == pytest.approx(2e-3, rel=0.01)


@pytest.mark.parametrize("stage", [1, 3])
def test_it_resumes_bit_for_bit(rank_pool, folder, straight, stage):
    name = f"resumed{stage}"
    rank_pool(1)(train_micro, folder, lion(folder, name, 2, f"args.zero_stage={stage}"))
    rank_pool(1)(train_micro, folder, lion(folder, name, 4, f"args.zero_stage={stage}", "args.resume=must"))
    never_stopped = "straight"
    if stage != 1:
        never_stopped = f"straight{stage}"
        rank_pool(1)(train_micro, folder, lion(folder, never_stopped, 4, f"args.zero_stage={stage}"))
    assert losses(folder, name) == losses(folder, never_stopped)
    saved = state_of(run_directory(folder, name) / "4")
    expected = state_of(run_directory(folder, never_stopped) / "4")
    for parameter in expected.shapes:
        for kind in ("master", "exp_avg"):
            assert torch.equal(saved.whole(kind)[parameter][:], expected.whole(kind)[parameter][:])


def test_a_run_and_its_checkpoints_record_the_extension(folder, straight):
    client_state = json.loads((straight / "4" / CLIENT_STATE).read_text())
    recorded = client_state["config"]["extensions"]["lion"]
    assert recorded["version"] == "1.0"
    assert [line.split()[1] for line in recorded["files"]] == ["__init__.py", "optimizer.py"]
    again = load_run_config([straight / "resolved.yaml"], lion(folder, "straight", 4)[:2])
    assert again.tree()["extensions"] == {"lion": recorded}
    assert f"Digest {again.digest()}" in (straight / "resolved.yaml").read_text()


def without(words: list[str]) -> list[str]:
    return words[2:]


def test_without_it_resuming_sampling_and_converting_are_refused_by_name(folder, straight, tmp_path):
    says = r"extensions\.lion: expected `--extension lion` on the command line: .* was written with it"
    for how in ("must", "auto", str(straight)):
        with pytest.raises(ConfigError, match=says):
            micro_run(folder, *without(lion(folder, "straight", 6, f"args.resume={how}")))
    words = [f"args.load={straight}", "--prompt", "a ball"]
    with pytest.raises(ConfigError, match=says):
        load_run_config(["configs/sample.yaml"], words, purpose="sample")
    for target in ("sat", "diffusers"):
        with pytest.raises(ConfigError, match=says):
            convert([str(straight), str(tmp_path / target), "--to", target])


def test_another_optimizer_cannot_resume_it_even_with_the_extension(folder, straight):
    config = micro_run(
        folder, *lion(folder, "straight", 6, "args.resume=must", "deepspeed.optimizer.type=AdamW")
    )
    with pytest.raises(
        ConfigError, match=r"deepspeed\.optimizer\.type = AdamW: expected Lion, as in the check"
    ):
        find_resumed(config)


def test_changed_files_are_named_and_can_be_accepted(folder, straight, tmp_path):
    write_extensions(tmp_path)
    with (tmp_path / "lion/optimizer.py").open("a") as file:
        file.write("# faster\n")
    words = lion(tmp_path, "straight", 6, "args.resume=must")
    says = r"extensions\.lion = optimizer\.py changed: expected the files .*accept"
    with pytest.raises(ConfigError, match=says):
        micro_run(folder, *words)
    sampled = [f"args.load={straight}", "--prompt", "a ball", *words[:2]]
    with pytest.raises(ConfigError, match=says):
        load_run_config(["configs/sample.yaml"], sampled, purpose="sample")
    assert load_run_config(
        ["configs/sample.yaml"], [*sampled, "--accept-changed-extension"], purpose="sample"
    )
    converted = [str(straight), str(tmp_path / "sat"), "--to", "sat", *words[:2]]
    with pytest.raises(ConfigError, match=says):
        convert(converted)
    assert convert([*converted, "--accept-changed-extension"]) == 0
    config = micro_run(folder, *words, "--accept-changed-extension")
    point = find_resumed(config)
    assert point is not None
    assert point.step == 4


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("params.beta1=0.5", r"params\.beta1 = 0\.5: expected a key that exists; did you mean 'beta_1'"),
        (
            "params.eps=0.5",
            r"params\.eps = 0\.5: expected a setting of Lion: lr, weight_decay, beta_1, beta_2",
        ),
        ("params.beta_1=2", r"params\.beta_1 = 2: expected a number >= 0 and < 1"),
        ("type=Lyon", r"type = Lyon: expected one of .*CAME, Lion, Muon.*; did you mean 'Lion'"),
    ],
)
def test_faults_in_its_settings_are_refused_with_a_suggestion(folder, word, says):
    with pytest.raises(ConfigError, match=says):
        micro_run(folder, *lion(folder, "typo", 1, f"deepspeed.optimizer.{word}"))


def test_a_configuration_without_the_extension_does_not_know_its_parts(folder):
    micro_run(folder, *lion(folder, "new", 1))
    with pytest.raises(
        ConfigError, match=r"deepspeed\.optimizer\.type = Lion: expected one of Adafactor, Adam"
    ):
        micro_run(folder, *without(lion(folder, "new", 1)))


LORA = "model.network_config.params.modules.lora_config"


def fixed_lora(folder: Path, name: str, steps: int, *words: str) -> list[str]:
    choice = [f"{LORA}.target=FixedLora", f"{LORA}.params.r=16", f"args.experiment_name={name}"]
    return [
        "--extension",
        str(folder / "fixed_lora.py"),
        *choice,
        f"args.train_iters={steps}",
        *CONSTANT,
        *words,
    ]


def plain_lora(folder: Path, name: str, alpha: float) -> list[str]:
    words = [f"args.experiment_name={name}", "args.train_iters=4", *CONSTANT]
    return [*words, f"{LORA}.params.r=16", f"{LORA}.params.lora_alpha={alpha:g}"]


def test_a_lora_variant_from_outside_trains_resumes_and_exports(rank_pool, folder, tmp_path):
    run = partial(rank_pool(1), train_micro, folder)
    run(fixed_lora(folder, "fixed", 4), "lora")
    run(fixed_lora(folder, "fixedresumed", 2), "lora")
    run(fixed_lora(folder, "fixedresumed", 4, "args.resume=must"), "lora")
    run(plain_lora(folder, "scaled", 16.0), "lora")
    run(plain_lora(folder, "plain", 1.0), "lora")
    assert losses(folder, "fixed") == losses(folder, "fixedresumed")
    assert losses(folder, "fixed") == losses(folder, "scaled"), "lora_alpha is 16 / 16"
    assert losses(folder, "fixed") != losses(folder, "plain")
    ours, theirs = (read_lora(run_directory(folder, name)) for name in ("fixed", "scaled"))
    assert ours.keys() == theirs.keys()
    for layer, parts in theirs.items():
        for mine, part in zip(ours[layer], parts, strict=True):
            assert torch.equal(mine.delta(), part.delta())
    with pytest.raises(ConfigError, match=r"extensions\.fixed_lora: expected `--extension fixed_lora`"):
        micro_run(folder, *without(fixed_lora(folder, "fixed", 6, "args.resume=must")), preset="lora")
    with pytest.raises(ConfigError, match=r"params\.lora_alpa = 3: expected a key that exists; did you mean"):
        micro_run(folder, *fixed_lora(folder, "typo", 1, f"{LORA}.params.lora_alpa=3"), preset="lora")


def tracked(folder: Path, name: str, steps: int, *words: str) -> list[str]:
    choice = ["args.callbacks.table.target=CsvTracker", f"args.experiment_name={name}"]
    return [
        "--extension",
        str(folder / "csv_tracker.py"),
        *choice,
        f"args.train_iters={steps}",
        *CONSTANT,
        *words,
    ]


def table(folder: Path, name: str) -> str:
    return (run_directory(folder, name) / "loss.csv").read_text()


@pytest.fixture(scope="module")
def tracked_run(rank_pool, folder) -> Path:
    rank_pool(2)(train_micro, folder, tracked(folder, "tracked", 4))
    return run_directory(folder, "tracked")


def test_a_tracker_from_outside_reports_and_keeps_its_state(rank_pool, folder, tracked_run):
    run = partial(rank_pool(2), train_micro, folder)
    run(tracked(folder, "untilhalf", 2))
    run(tracked(folder, "untilhalf", 4, "args.resume=must"))
    assert table(folder, "tracked") == table(folder, "untilhalf")
    expected = [f"{step},{loss}" for step, loss in enumerate(losses(folder, "tracked"), 1)]
    assert table(folder, "tracked").splitlines() == expected
    kept = json.loads((run_directory(folder, "untilhalf") / "4" / CLIENT_STATE).read_text())["callbacks"]
    assert kept["CsvTracker"] == {"lines": 4}


def test_a_tracker_is_named_and_its_settings_are_checked(folder, tracked_run):
    with pytest.raises(ConfigError, match=r"extensions\.csv_tracker: expected `--extension csv_tracker`"):
        micro_run(folder, *without(tracked(folder, "tracked", 6, "args.resume=must")))
    with pytest.raises(
        ConfigError, match=r"params\.fil = x: expected a key that exists; did you mean 'file'"
    ):
        micro_run(folder, *tracked(folder, "typo", 1, "args.callbacks.table.params.fil=x"))
    with pytest.raises(ConfigError, match=r"callbacks\.a-b: expected a name of letters, digits and `_`"):
        micro_run(folder, *tracked(folder, "typo", 1), "args.callbacks={a-b: {target: CsvTracker}}")


def bright(folder: Path, name: str, steps: int, *words: str) -> list[str]:
    choice = ["model.conditions.brightness.target=Brightness", f"args.experiment_name={name}"]
    module = "model.modules.brightness.target=BrightnessFeatures"
    extension = ["--extension", str(folder / "brightness")]
    return [*extension, *choice, module, f"args.train_iters={steps}", *CONSTANT, *words]


_KEEPER = '''
"""A callback that names a file of weights."""

from sat_train.parts import CallbackParams, Field, WeightsFile, part


@part("callback", "Keeper", build=":build")
class KeeperParams(CallbackParams):
    """Does nothing with the file."""

    weights: WeightsFile = Field(description="The file.")


def build(params, context):
    from sat_train.extend import Callback

    return Callback()
'''


def test_a_condition_with_a_network_module_from_outside_trains_and_resumes(rank_pool, folder):
    run = partial(rank_pool(2), train_micro, folder)
    run(["args.experiment_name=dark0", "args.train_iters=4", *CONSTANT])
    run(bright(folder, "bright", 4))
    (folder / "keeper.py").write_text(_KEEPER)
    (folder / "kept.pt").write_bytes(b"one")
    kept = ["--extension", f"{folder}/keeper.py", "args.callbacks.keeper.target=Keeper"]
    kept.append(f"args.callbacks.keeper.params.weights={folder}/kept.pt")
    run(bright(folder, "brighthalf", 2, *kept))
    (folder / "kept.pt").write_bytes(b"two")
    with pytest.raises(FailedOnRank, match=r"kept\.pt: not the weights that step 2 of .* trained with"):
        run(bright(folder, "brighthalf", 4, "args.resume=must", *kept))
    (folder / "kept.pt").write_bytes(b"one")
    run(bright(folder, "brighthalf", 4, "args.resume=must", *kept))
    assert (
        f"# {folder}/kept.pt has the content" in (run_directory(folder, "brighthalf") / RESOLVED).read_text()
    )
    base, ours = losses(folder, "dark0"), losses(folder, "bright")
    assert ours[0] == base[0], "a module that begins at zero leaves the model as it is"
    assert ours[2:] != base[2:]
    assert losses(folder, "brighthalf") == ours
    saved = read_fragments(
        run_directory(folder, "bright") / "4",
        read_manifest(run_directory(folder, "bright") / "4"),
        model_rank=0,
        model_size=1,
    )
    assert saved.whole("master")["mixins.brightness.project.weight"][:].abs().max() > 0


def test_its_encodings_are_cached_and_dropped_like_those_of_the_package(rank_pool, folder):
    run = partial(rank_pool(1), train_micro, folder)
    drop = "model.conditions.brightness.drop=0.5"
    cache = f"data.cache_dir={folder}/cache"
    run(bright(folder, "uncached", 4, drop))
    run(bright(folder, "filled", 4, drop, cache, "data.cache=fill"))
    run(bright(folder, "reread", 4, drop, cache, "data.cache=require"))
    run(bright(folder, "undropped", 4, cache, "data.cache=require"))
    assert losses(folder, "filled") == losses(folder, "uncached")
    assert losses(folder, "reread") == losses(folder, "uncached")
    assert losses(folder, "undropped")[2:] != losses(folder, "uncached")[2:]


def test_with_lora_the_module_trains_next_to_the_adapters_and_each_is_exported(rank_pool, folder, tmp_path):
    words = ["args.eval_interval=2", "args.valid_video_interval=2", "args.valid_prompts=[a ball]"]
    size = ["args.sampling_num_frames=5", "args.sampling_image_size=[32,32]", "args.sampling_steps=2"]
    rank_pool(1)(train_micro, folder, bright(folder, "brightlora", 2, *words, *size), "lora")
    saved = state_of(run_directory(folder, "brightlora") / "2")
    assert "mixins.brightness.project.weight" in saved.shapes
    assert any(".matrix_A." in name for name in saved.shapes)
    run = run_directory(folder, "brightlora")
    assert (run / "samples/000002/00.mp4").exists()
    extension = ["--extension", str(folder / "brightness")]
    with pytest.raises(CheckpointError, match=r"has the modules brightness, which diffusers does not know"):
        convert([str(run), str(tmp_path / "hf"), "--to", "diffusers", *extension])
    assert (
        convert([str(run), str(tmp_path / "hf"), "--to", "diffusers", "--without-modules", *extension]) == 0
    )
    assert read_lora(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"extensions\.brightness: expected `--extension brightness`"):
        convert([str(run), str(tmp_path / "out"), "--to", "modules"])
    assert convert([str(run), str(tmp_path / "out"), "--to", "modules", *extension]) == 0
    weights, record = read_module_file(tmp_path / "out/modules.safetensors")
    assert set(weights) == {"mixins.brightness.project.weight", "mixins.brightness.project.bias"}
    assert record.extensions.keys() == {"brightness"}
    parts = [f"args.load_modules={tmp_path}/out", f"args.load_lora={run}"]
    rank_pool(1)(train_micro, folder, bright(folder, "brightparts", 1, *parts), "lora")
    rank_pool(1)(train_micro, folder, bright(folder, "brightwhole", 1, f"args.load={run}"), "lora")
    assert losses(folder, "brightparts") == losses(folder, "brightwhole") != losses(folder, "brightlora")[:1]


def test_conditions_and_modules_are_named_where_they_are_missing_or_misspelt(folder):
    with pytest.raises(ConfigError, match=r"Brightness: expected one of ControlPixels.* --extension"):
        micro_run(folder, *bright(folder, "x", 1)[2:])
    with pytest.raises(ConfigError, match=r"target = Brightnes: expected .*did you mean 'Brightness'"):
        micro_run(folder, *bright(folder, "x", 1, "model.conditions.brightness.target=Brightnes"))
    with pytest.raises(ConfigError, match=r"model\.modules\.lora = lora: expected another name"):
        micro_run(folder, *bright(folder, "x", 1, "model.modules.lora.target=BrightnessFeatures"))

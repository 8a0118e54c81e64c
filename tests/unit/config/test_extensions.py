"""What is wrong with an extension is said by name, with its file and line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sat_train.config import RunConfig, load_run_config
from sat_train.config.explain import explain_key
from sat_train.config.extensions import VARIABLE, load_extensions
from sat_train.config.json_schema import render_json_schema
from sat_train.errors import ConfigError, Fault
from tests.ranks.extensions import write_extensions
from tests.unit.config.test_check_command import check

RECORD = '''
from sat_train.parts import Field, OptimizerParams, part

@part("{slot}", "{name}", build="{build}")
class Mine(OptimizerParams):
    """Mine."""

    share: float = Field(0.5, description="{description}")
'''


@pytest.fixture(autouse=True)
def _forget():
    yield
    load_extensions([])


def write(path: Path, *, slot="optimizer", name="Mine", build=":build", description="A share.") -> str:
    path.write_text(RECORD.format(slot=slot, name=name, build=build, description=description))
    return str(path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"slot": "optimiser"},
            r"mine\.py:4 raises ValueError: there is no slot 'optimiser'.*mean 'optimizer'",
        ),
        (
            {"name": "AdamW"},
            r"mine\.py:4 raises ValueError: the optimizer 'AdamW' is registered already, by sat_",
        ),
        ({"description": ""}, r"ValueError: .* needs descriptions \(with a full stop\) for share"),
        ({"build": "mine"}, r"ValueError: optimizer 'Mine' needs a plain name and build='module:callable'"),
    ],
)
def test_what_a_registration_lacks_is_said_with_file_and_line(tmp_path, settings, says):
    with pytest.raises(
        ConfigError, match=rf"--extension = .*expected a module that can be imported; .*{says}"
    ):
        load_extensions(["--extension", write(tmp_path / "mine.py", **settings)])


def test_two_extensions_cannot_register_one_name(tmp_path):
    words = [word for stem in ("one", "two") for word in ("--extension", write(tmp_path / f"{stem}.py"))]
    with pytest.raises(
        ConfigError, match=r"two\.py:4 raises ValueError: .*'Mine' is registered already, by one"
    ):
        load_extensions(words)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("\n1 / 0\n", r"broken\.py:2 raises ZeroDivisionError: division by zero"),
        ("def f(:\n", r"broken\.py:1 raises SyntaxError"),
        (
            "import nowhere_to_be_found\n",
            r"broken\.py:1 raises ModuleNotFoundError: No module named 'nowhere",
        ),
    ],
)
def test_a_file_that_raises_is_named_with_its_line(tmp_path, content, says):
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(ConfigError, match=says):
        load_extensions(["--extension", str(tmp_path / "broken.py")])


def test_what_is_no_extension_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "json.py").write_text("")
    (tmp_path / "my-lion.py").write_text("")
    for name, says in {
        "nowhere": "a Python file, a folder with __init__.py, or an installed package; there is no such",
        str(tmp_path / "empty"): "a folder without __init__",
        str(tmp_path / "json.py"): "another name: there is a module 'json' already",
        str(tmp_path / "my-lion.py"): "a file or folder whose name is a Python name",
    }.items():
        with pytest.raises(ConfigError, match=says):
            load_extensions(["--extension", name])
    with pytest.raises(
        ConfigError, match="--extension: expected a Python file, a folder or an installed package"
    ):
        load_extensions(["--extension"])


def test_the_environment_names_extensions_for_batch_scripts(tmp_path, monkeypatch):
    paths = [write(tmp_path / f"{stem}.py", name=stem.title()) for stem in ("one", "two", "three")]
    monkeypatch.setenv(VARIABLE, os.pathsep.join(paths[:2]))
    extensions, rest = load_extensions(["--seed", "3", f"--extension={paths[2]}", "args.lr=1"])
    assert [each.name for each in extensions.loaded] == ["one", "two", "three"]
    assert rest == ["--seed", "3", "args.lr=1"]


def test_each_part_of_the_page_takes_one_file_or_two_where_torch_begins(tmp_path):
    write_extensions(tmp_path)
    files = [path.relative_to(tmp_path).parts[0].removesuffix(".py") for path in tmp_path.rglob("*.py")]
    one_file = dict.fromkeys(
        ("fixed_lora", "careful", "csv_tracker", "eta_ddim", "interval_guidance", "riflex", "late_timesteps"),
        1,
    )
    assert Counter(files) == {"lion": 2, "labels": 2, "brightness": 2, "tracks": 2, **one_file}


def test_schema_and_explanations_know_a_part_from_outside(tmp_path):
    write_extensions(tmp_path)
    before = json.loads(render_json_schema())
    load_extensions(["--extension", str(tmp_path / "lion")])
    schema = json.loads(render_json_schema())
    assert schema["$defs"].keys() - before["$defs"].keys() == {"LionParams"}
    assert "CAME, Lion, Muon" in explain_key("deepspeed.optimizer.type", None)
    assert "Decay of the momentum." in explain_key("deepspeed.optimizer.params.beta_2", None)
    load_extensions([])
    assert json.loads(render_json_schema()) == before


def test_a_configuration_is_checked_without_torch(tmp_path):
    write_extensions(tmp_path)
    words = ["--base", "configs/sft.yaml", "--no-paths", "deepspeed.optimizer.type=Lion"]
    done = check(*words, "--extension", str(tmp_path / "lion"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "Lion, lr 1e-05" in done.stdout
    assert "extensions.lion.version" in done.stdout


def test_one_that_imports_torch_with_the_configuration_is_told_where_to_put_it(tmp_path):
    (tmp_path / "torch.py").write_text("")  # stands for torch: what counts is that it is imported
    (tmp_path / "heavy.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport torch\n")
    command = [sys.executable, "-m", "sat_train.cli.main", "check", "--extension", str(tmp_path / "heavy.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "expected torch in a second file, which `build=` names" in done.stderr


@pytest.mark.parametrize(
    "recorded", ["[1]", "7", "{lion: 3}", "{lion: {files: [1]}}", "{lion: {version: 2}}"]
)
def test_a_record_that_no_run_has_written_is_refused(tmp_path, recorded):
    (tmp_path / "odd.yaml").write_text(f"extensions: {recorded}\n")
    with pytest.raises(
        ConfigError, match=r"extensions.*: expected version and files of each, as a run writes"
    ):
        load_run_config(["configs/sft.yaml", tmp_path / "odd.yaml"], check_paths=False)


def careful(tmp_path: Path, *words: str) -> RunConfig:
    write_extensions(tmp_path)
    words = ["--extension", str(tmp_path / "careful.py"), *words]
    return load_run_config(["configs/sft.yaml"], words, check_paths=False)


def test_a_guard_rail_from_outside_refuses_with_the_other_faults(tmp_path):
    careful(tmp_path, "args.lr=0.1")
    says = r"(?s)2 faults.*args\.clip_grad = 0: expected a limit, because args\.lr is above 0\.01 \[command"
    with pytest.raises(ConfigError, match=says):
        careful(tmp_path, "args.lr=0.1", "args.clip_grad=0", "args.mode=inference")
    with pytest.raises(ConfigError, match=r"1 fault .*\n  - args\.lr = fast"):
        careful(tmp_path, "args.lr=fast", "args.clip_grad=0")


def test_a_fault_shows_a_value_of_any_type():
    shown = [str(Fault("args.seed", value, "another")) for value in (0, 3407, False, (1, 2), "")]
    assert shown == [
        f"args.seed{value}: expected another" for value in (" = 0", " = 3407", " = False", " = (1, 2)", "")
    ]


def test_one_that_warns_is_a_note_until_it_is_silenced(tmp_path):
    (note,) = [note for note in careful(tmp_path, "args.seed=3407").notes if "seed" in note]
    assert note == (
        "args.seed = 3407: expected another seed next to it [command line] "
        "(https://arxiv.org/abs/2109.08203; args.silence=[seeds_are_not_tuned] hides this)"
    )
    silenced = careful(tmp_path, "args.seed=3407", "args.silence=[seeds_are_not_tuned]")
    assert not [note for note in silenced.notes if "seed" in note]
    assert not [
        note for note in load_run_config(["configs/sft.yaml"], check_paths=False).notes if "seed" in note
    ]


def test_a_name_of_a_guard_rail_can_be_taken_once(tmp_path):
    code = "from sat_train.parts import guard_rail\n@guard_rail()\ndef mine(config):\n    yield from ()\n"
    for stem in ("first", "second"):
        (tmp_path / f"{stem}.py").write_text(code)
    words = ["--extension", str(tmp_path / "first.py"), "--extension", str(tmp_path / "second.py")]
    with pytest.raises(ConfigError, match="the guard rail 'mine' is registered already, by first"):
        load_extensions(words)


def test_a_configuration_can_be_sent_to_another_process():
    config = load_run_config(["configs/lora.yaml"], check_paths=False)
    model, deepspeed = pickle.loads(pickle.dumps((config.model, config.deepspeed)))
    assert (model, deepspeed) == (config.model, config.deepspeed)

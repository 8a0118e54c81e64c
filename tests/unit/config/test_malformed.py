"""Each thing that can be wrong gets one line: key, value, expectation, file. All of them come at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sat_train.config import load_run_config
from sat_train.errors import ConfigError, Fault
from tests.unit.config.malformed import CASES, TINY_T5, Case


def faults_of(case: Case, folder: Path) -> dict[str, Fault]:
    broken = folder / "broken.yaml"
    broken.write_text(case.text, encoding="utf-8")
    files = ["configs/model/cogvideox_tiny.yaml", "configs/sft.yaml", *([str(broken)] if case.text else [])]
    with pytest.raises(ConfigError) as caught:
        load_run_config(files, case.words, purpose=case.purpose, check_paths=False)
    return {fault.path: fault for fault in caught.value.faults}


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_one_thing_wrong_is_one_clear_line(case: Case, tmp_path: Path) -> None:
    faults = faults_of(case, tmp_path)
    assert list(faults) == [case.path]
    line = str(faults[case.path])
    assert case.says in line
    assert "\n" not in line
    if case.text and faults[case.path].source not in ("default", "configs/sft.yaml"):
        assert "tiny.yaml" in line or "broken.yaml" in line


# Faults in different places; of two where one hides the other, one.
TOGETHER = (
    "argument",
    "model key",
    "deepspeed key",
    "choice",
    "unknown target",
    "50 frames",
    "both precisions",
    "heads",
)


def test_all_faults_come_at_once(write: Callable[[str, str], str]) -> None:
    cases = [case for case in CASES if case.name in TOGETHER]
    files = [write(f"{index}.yaml", case.text) for index, case in enumerate(cases)]
    with pytest.raises(ConfigError) as caught:
        load_run_config(["configs/sft.yaml", *files], check_paths=False)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{len(cases)} faults in the configuration:"
    for case, file in zip(cases, files, strict=True):
        assert sum(f"- {case.path} " in line and case.says in line for line in lines) == 1
        assert (
            any(f"- {case.path} " in line and Path(file).name in line for line in lines)
            or case.name == "heads"
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("args: [1, 2", "readable YAML, but: "),
        ("args: {seed: 1}\nargs: {seed: 2}", "found duplicate key args"),
        ("- a\n- b", "sections such as `args:`"),
        ("base: {a: 1}", "a list of YAML files"),
        ("base: [nowhere.yaml]", "nowhere.yaml: expected a YAML file that exists"),
    ],
)
def test_files_that_are_no_configuration(text: str, says: str, write: Callable[[str, str], str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(["configs/sft.yaml", write("broken.yaml", text)], check_paths=False)
    assert says in str(caught.value)
    assert "broken.yaml" in str(caught.value)
    assert len(caught.value.faults) == 1


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"--base = configs/stf\.yaml: expected a YAML file that exists"):
        load_run_config(["configs/stf.yaml"], check_paths=False)


MISSING_PATHS = {
    "args.train_data.0": "args: {train_data: [/nowhere/train]}",
    "args.valid_data.0": "args: {valid_data: /nowhere/valid}",
    "args.load": "args: {load: /nowhere/weights.pt}",
    "args.resume": "args: {resume: /nowhere/run}",
    "model.first_stage_config.params.ckpt_path": """
model: {first_stage_config: {params: {ckpt_path: /nowhere/vae.pt}}}
""",
    "model.conditioner_config.params.emb_models.0.params.model_dir": TINY_T5
    % "params: {model_dir: /nowhere/t5, max_length: 32}",
}


@pytest.mark.parametrize("path", MISSING_PATHS)
def test_missing_paths_are_named(path: str, write: Callable[[str, str], str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(["configs/sft.yaml", write("broken.yaml", MISSING_PATHS[path])])
    line = next(str(fault) for fault in caught.value.faults if fault.path == path)
    assert "/nowhere/" in line
    assert (
        "a run directory that exists" if path == "args.resume" else "a file or folder that exists"
    ) in line
    assert "broken.yaml" in line


def test_patterns_and_remote_places_are_data(tmp_path: Path) -> None:
    for name in ("shard-008.tar", "shard-009.tar", "shard-010.tar"):
        (tmp_path / name).touch()
    given = ["{008..010}.tar", "{008,010}.tar", "01*.tar"]
    entries = [f"{tmp_path}/shard-{name}" for name in given] + ["s3://b/{000..099}.tar", "https://h/*.tar"]
    files = ["configs/sft.yaml"]
    config = load_run_config(files, [f"args.train_data={json.dumps(entries)}"], purpose="check")
    assert list(config.args.train_data) == entries
    wrong = json.dumps([f"{tmp_path}/shard-{{008..011}}.tar", f"{tmp_path}/none-*.tar"])
    with pytest.raises(ConfigError) as caught:
        load_run_config(files, [f"args.valid_data={wrong}"], purpose="check")
    faults = {fault.path: fault.value for fault in caught.value.faults}
    assert faults["args.valid_data.0"] == f"{tmp_path}/shard-011.tar"
    assert faults["args.valid_data.1"] == f"{tmp_path}/none-*.tar"


def test_placeholders_may_be_checked_but_not_trained() -> None:
    files = ["configs/model/cogvideox_5b.yaml", "configs/sft.yaml"]
    config = load_run_config(files, purpose="check")
    assert config.needs.endswith("args.load = {folder of CogVideoX-5b}, to be filled in")
    with pytest.raises(ConfigError, match="the diffusers folder of these weights"):
        load_run_config(files, purpose="train")

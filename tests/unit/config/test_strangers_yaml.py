"""A stranger's YAML: nothing of this machine leaves through it, and it takes neither time nor room."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sat_train.config import load_run_config
from sat_train.config.explain import list_values
from sat_train.config.resolved import render_resolved, write_resolved
from sat_train.config.yaml_text import NotPlain, parse_yaml
from sat_train.errors import ConfigError
from tests.unit.config.conftest import Load

Write = Callable[[str, str], str]
SECRET = "hunter2-secret"
RESOLVERS = (
    "oc.env",
    "oc.create",
    "oc.decode",
    "oc.deprecated",
    "oc.dict.keys",
    "oc.dict.values",
    "oc.select",
)
ARGUMENTS = "SAT_TEST_SECRET"


def nestings(resolver: str) -> Iterator[str]:
    """Yields ways to reach a resolver whose name the grammar lets one put together, at several depths."""
    prefix = resolver.rpartition(".")[0]
    yield f"${{{resolver}:{ARGUMENTS}}}"
    yield f"${{ {resolver} : {ARGUMENTS} }}"
    yield f"${{{prefix}.${{args.wandb_project_name}}:{ARGUMENTS}}}"
    yield f"${{${{args.experiment_name}}:{ARGUMENTS}}}"
    yield f"${{oc.decode:'${{{resolver}:{ARGUMENTS}}}'}}"
    yield f"${{oc.select:args.${{{resolver}:{ARGUMENTS}}}}}"
    yield f"\\${{{resolver}:{ARGUMENTS}}}"
    yield f"\\\\${{{resolver}:{ARGUMENTS}}}"
    yield f"${{args[${{{resolver}:{ARGUMENTS}}}]}}"
    nested = f"${{{resolver}:{ARGUMENTS}}}"
    for _ in range(5):
        nested = f"${{{prefix}.{nested}}}"
    yield nested
    yield f"$${{args.save}}{{{resolver}:{ARGUMENTS}}}"


PLACES = {
    "a text": "args: {{wandb_project_name: env, experiment_name: oc.env, output_dir: {0}}}",
    "a list": "args: {{wandb_project_name: env, train_data: [a, {0}]}}",
    "a number": "args: {{wandb_project_name: env, lr: {0}}}",
    "a target": "model: {{sampler_config: {{target: {0}}}}}",
    "a section": "deepspeed: {0}",
    "a key": "args: {{{0}: 1}}",
    "a base": "base: {0}",
}


@pytest.mark.parametrize("resolver", RESOLVERS)
@pytest.mark.parametrize("place", PLACES)
def test_no_resolver_is_ever_reached(resolver: str, place: str) -> None:
    assert OmegaConf.has_resolver(resolver), "the resolver exists, and would run"
    for text in nestings(resolver):
        with pytest.raises(NotPlain):
            parse_yaml(PLACES[place].format(json.dumps(text)))


@pytest.mark.parametrize("place", PLACES)
def test_no_environment_variable_leaves_through_a_file(
    place: str, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    monkeypatch.setenv(ARGUMENTS, SECRET)
    for text in nestings("oc.env"):
        with pytest.raises(ConfigError) as caught:
            load(PLACES[place].format(json.dumps(text)))
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("resolver", ["oc.env"])
def test_no_resolver_is_reached_from_the_command_line(
    resolver: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ARGUMENTS, SECRET)
    for text, word in itertools.product(
        nestings(resolver), ("args.output_dir=", "args.train_data=[x,'%s']", "--prompt=")
    ):
        with pytest.raises(ConfigError) as caught:
            load("", word % text if "%s" in word else word + text)
        assert SECRET not in str(caught.value)


def test_no_resolver_is_reached_from_a_runs_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ARGUMENTS, SECRET)
    (tmp_path / "resolved.yaml").write_text(
        "args: {sampler: '${oc.${args.mode}:SAT_TEST_SECRET}', mode: env}"
    )
    with pytest.raises(ConfigError, match=r"args\.sampler = .*resolvers such as") as caught:
        load_run_config([], ["--prompt", "x", f"--load={tmp_path}"], purpose="sample", check_paths=False)
    assert SECRET not in str(caught.value)


def test_pieces_that_become_a_reference_when_put_together_are_refused(load: Load) -> None:
    pieces = "args: {wandb_project_name: '{oc.env:HOME}', experiment_name: '$', output_dir: '%s'}"
    with pytest.raises(ConfigError, match=r"args\.output_dir"):
        load(pieces % "${args.experiment_name}${args.wandb_project_name}")


@pytest.mark.parametrize(
    "text", ["args: {save: '${args.load}', load: '${args.save}'}", "args: {save: '${args}'}"]
)
def test_a_reference_leads_to_a_value_not_to_another_reference(text: str, load: Load) -> None:
    with pytest.raises(ConfigError, match=r"expected a reference `\$\{section.key\}` to a key with a value"):
        load(text)


def test_a_reference_keeps_the_type_of_its_value(load: Load) -> None:
    config = load(
        "args: {sampling_image_size: '${data.params.video_size}', wandb_project_name: 'p${data.params.fps}'}"
    )
    assert config.args.sampling_image_size == (64, 96)
    assert config.args.wandb_project_name == "p8"


@pytest.mark.parametrize(
    "text", [f"root:{SECRET}:0", f"a: b: {SECRET}", f"[{SECRET}", f"- {SECRET}", f"'{SECRET}"]
)
@pytest.mark.parametrize("name", ["private.yaml", "passwd"])
def test_a_file_that_is_no_configuration_is_never_quoted(text: str, name: str, write: Write) -> None:
    private = write(name, text)
    for base in ([private], [write("stranger.yaml", f"base: {private}")]):
        with pytest.raises(ConfigError) as caught:
            load_run_config(base, check_paths=False)
        assert SECRET not in str(caught.value)


def test_what_a_run_keeps_names_no_other_file(tmp_path: Path, load: Load) -> None:
    private = tmp_path / "private.yaml"
    private.write_text(f"args: {{seed: {SECRET}}}\n")
    kept = render_resolved(load("", "--sampler", "DDIM"))
    (tmp_path / "resolved.yaml").write_text(f"base: {private}\n{kept}")
    words = ["--prompt", "x", f"--load={tmp_path}"]
    config = load_run_config([], words, purpose="sample", check_paths=False)
    assert config.args.sampler == "DDIM"
    with pytest.raises(ConfigError, match="no other file: the configuration that a run saves is complete"):
        load_run_config([tmp_path / "resolved.yaml"], check_paths=False)


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path: Path, write: Write) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero"), Path("/dev/stdin"), tmp_path):
        with pytest.raises(ConfigError, match="a YAML file; this is a folder, pipe or device"):
            load_run_config([path], check_paths=False)


def test_a_file_without_end_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse.yaml").open("wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(ConfigError, match="a YAML file of at most 1,000,000 bytes"):
        load_run_config([tmp_path / "sparse.yaml"], check_paths=False)


def test_a_chain_of_files_ends(write: Write) -> None:
    for number in range(50):
        first = write(f"{number}.yaml", f"base: {number - 1}.yaml" if number else "args: {seed: 1}")
    with pytest.raises(ConfigError, match="at most 20 files in a row"):
        load_run_config([first], check_paths=False)


def test_what_multiplies_is_refused_before_it_is_built(load: Load) -> None:
    laughs = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'lol'}]" for n in range(20))
    for text in (laughs, "args: " + "[" * 100_000, "args: " + "{a: " * 5000, "a: &a [*a]", "- " * 5000):
        with pytest.raises(ConfigError) as caught:
            load(text)
        assert len(str(caught.value)) < 1000


def test_no_secret_of_a_url_is_shown_or_counted(load: Load) -> None:
    urls = [
        f"https://user:{SECRET}@host/a.tar",
        f"https://bucket/b.tar?X-Amz-Signature={SECRET}&X-Amz-Date=1",
    ]
    config = load("", f"args.train_data={json.dumps(urls)}")
    assert SECRET not in list_values(config)
    assert SECRET not in json.dumps(config.shown_tree())
    assert "https://user:***@host/a.tar" in list_values(config)
    with pytest.raises(ConfigError) as caught:
        load(
            "", f"args.train_data={json.dumps([*urls, 5])}", f"args.load={urls[0]}/{'x' * 300}", "args.nope=1"
        )
    assert SECRET not in str(caught.value)


def test_what_a_run_keeps_still_works_and_is_its_owners_alone(load: Load, tmp_path: Path) -> None:
    urls = [f"https://user:{SECRET}@host/a.tar"]
    config = load("", f"args.train_data={json.dumps(urls)}")
    kept = tmp_path / "resolved.yaml"
    write_resolved(config, kept)
    again = load_run_config([kept], check_paths=False)
    assert again.args.train_data == tuple(urls)
    assert (
        again.digest()
        == config.digest()
        == load("", "args.train_data=['https://user:other@host/a.tar']").digest()
    )
    assert kept.stat().st_mode & 0o077 == 0
    write_resolved(load(), kept)
    assert kept.stat().st_mode & 0o040

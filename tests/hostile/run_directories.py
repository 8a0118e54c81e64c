"""Hostile run directories: resumed, sampled from, converted, trained from."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from sat_train.checkpoint.layout import CLIENT_STATE
from tests.hostile.case import Case, Field
from tests.hostile.real_run import RESUME, STEP, copy_run, replace_file, sign
from tests.hostile.words import SAMPLE, TRAIN
from tests.unit.checkpoint.hostile import Evil

_COMMANDS: dict[str, list[str]] = {
    "resume": [*RESUME, "args.resume=run"],
    "load": [*TRAIN, "args.load=run"],
    "sample": [*SAMPLE, "args.prompt=x", "args.load=run"],
    "convert": ["convert", "run", "out", "--to", "diffusers"],
}
# Whatever a run may write; a run directory from somebody else may hold it already.
_FILES = (
    "run.lock",
    "resolved.yaml",
    "model_config.json",
    "metrics.jsonl",
    "quarantine.jsonl",
    "latest",
    "latest.part",
    "PREEMPTED",
    "wandb_id",
    "tensorboard",
    "samples",
    "2",
    ".tmp-2-0a0b0c0d",
)
_IN_STEP = ("manifest.json", "mp_rank_00_model_states.pt")


def cases() -> Iterator[Case]:
    """Gives all hostile run directories."""
    yield from _link_cases()
    yield from _manifest_cases()
    yield from _shard_cases()
    yield from _client_state_cases()
    yield from _layout_cases()
    yield from _resolved_cases()


def _case(name: str, command: str, prepare: Callable[[Field, Path], object], **more: Any) -> Case:
    def make(field: Field) -> list[str]:
        prepare(field, copy_run(field.inside))
        return _COMMANDS[command]

    return Case(f"run: {name}, {command}", make, **more)


def _put(run: Path, name: str) -> Path:
    path = run / name
    path.unlink(missing_ok=True) if not path.is_dir() else path.rename(run / "away")
    return path


_KINDS: dict[str, Callable[[Field, Path], object]] = {
    "a link to a file": lambda field, path: path.symlink_to(field.victim),
    "a link to a folder": lambda field, path: path.symlink_to(field.outside),
    "a link to nothing yet": lambda field, path: path.symlink_to(field.outside / "new"),
    "a FIFO": lambda field, path: os.mkfifo(path),
    "a link to a device": lambda field, path: path.symlink_to("/dev/zero"),
}


def _link_cases() -> Iterator[Case]:
    """A run that puts its own file in place of the link is as right as one that refuses."""
    for name in _FILES:
        for kind, place in _KINDS.items():
            yield _case(
                f"{name} is {kind}",
                "resume",
                lambda field, run, name=name, place=place: place(field, _put(run, name)),
                codes=(0, 2),
            )
    for name in _IN_STEP:
        for number, (kind, place) in enumerate(_KINDS.items()):
            yield _case(
                f"{name} of the step is {kind}",
                list(_COMMANDS)[number % 4],
                lambda field, run, name=name, place=place: place(field, _put(run / STEP, name)),
            )


def _names(*names: str) -> Callable[[dict[str, Any]], object]:
    def change(body: dict[str, Any]) -> None:
        body["files"] = [{"name": name, "size": 0, "sha256": "0" * 64} for name in names]

    return change


def _set(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda body: body.update(values)


def _base(source: str) -> Callable[[dict[str, Any]], object]:
    return _set(base_weights={"source": source, "sha256": "0" * 64})


_MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "upwards": _names("../../../outside/secret.txt"),
    "absolute": _names("/etc/passwd"),
    "device": _names("/dev/zero"),
    "terminal": _names("/dev/tty"),
    "memory": _names("/proc/self/mem"),
    "the folder": _names("."),
    "nothing": _names(""),
    "a folder in it": _names("a/b"),
    "a NUL": _names("a\0b"),
    "a surrogate": _names("\ud800"),
    "escapes": _names("\x1b[2J\x1b]0;owned\x07"),
    "5000 letters": _names("x" * 5000),
    "a million names": _names(*["x"] * 100_000),
    "files of numbers": _set(files=[1, 2]),
    "files of lists": _set(files=[["name", "size", "sha256"]]),
    "size as text": _set(files=[{"name": "latest", "size": "1", "sha256": "x"}]),
    "a field too many": _set(files=[{"name": "x", "size": 1, "sha256": "x", "evil": 1}]),
    "huge world": _set(world_size=10**12, data_size=10**12),
    "negative world": _set(world_size=-1, data_size=-1),
    "huge model axis": _set(model_size=10**9),
    "a type nobody knows": _set(dtype="int3"),
    "a type of numbers": _set(dtype=[16]),
    "another step": _set(step=10**30),
    "step as text": _set(step="../../outside"),
    "samples as text": _set(samples_consumed="many"),
    "samples beyond all": _set(samples_consumed=10**400),
    "waiting beyond all": _set(samples_waiting=[10**30, -5]),
    "waiting texts": _set(samples_waiting=["a"]),
    "base is itself": _base("run"),
    "base is its step": _base(f"run/{STEP}"),
    "base is a device": _base("/dev/zero"),
    "base is an address": _base("http://127.0.0.1:{port}/w.safetensors"),
    "base is the secret": _base("../outside/secret.txt"),
    "base of a list": _set(base_weights=[1]),
    "base of numbers": _set(base_weights={"source": 1, "sha256": 2}),
    "base with escapes": _base("\x1b[2J"),
    "base upwards of assets": _base("asset:../../../etc/passwd"),
    "versions of lists": _set(versions=[["torch"]]),
    "format 99": _set(format=99),
    "an extra key": _set(evil="os.system"),
}
_RAW = {
    "empty": b"",
    "a list": b"[1]",
    "brackets": b"[" * 100_000,
    "long number": b'{"step": ' + b"9" * 5000 + b"}",
    "not utf-8": b"\xff\xfe{}",
    "a text": b'"manifest"',
    "NaN": b'{"step": NaN}',
}


def _manifest_cases() -> Iterator[Case]:
    commands = list(_COMMANDS)
    for number, (name, change) in enumerate(_MANIFESTS.items()):

        def prepare(field: Field, run: Path, change: Callable[[dict[str, Any]], object] = change) -> None:
            path = run / STEP / "manifest.json"
            body = json.loads(path.read_text())
            change(body)
            if isinstance(body["base_weights"], dict) and isinstance(body["base_weights"]["source"], str):
                source = body["base_weights"]["source"].replace("{port}", str(field.port))
                body["base_weights"]["source"] = source
            sign(path, body)

        for command in ("resume", commands[1 + number % 3]):
            yield _case(f"manifest, {name}", command, prepare, codes=_manifest_codes(name))
    for name, content in _RAW.items():
        yield _case(
            f"manifest of {name}",
            "resume",
            lambda field, run, content=content: (run / STEP / "manifest.json").write_bytes(content),
        )
    yield _case("a chain of bases", "sample", _chain)
    yield _case("a sparse manifest", "resume", _sparse_manifest)


def _manifest_codes(name: str) -> tuple[int, ...]:
    """What a manifest says for people alone may say anything."""
    if name.startswith("base"):  # adapters alone are exported without it
        return (0, 2)
    return (0, 2) if name in ("versions of lists", "samples beyond all", "waiting beyond all") else (2,)


def _chain(field: Field, run: Path) -> None:
    path = run / STEP / "manifest.json"
    body = json.loads(path.read_text())
    for number in range(300):
        link = field.inside / f"base{number}" / STEP
        link.mkdir(parents=True)
        _base(f"base{number + 1}")(body)
        for file in body["files"]:
            os.link(run / STEP / file["name"], link / file["name"])
        sign(link / "manifest.json", body)
    _base("base0")(body)
    sign(path, body)


def _sparse_manifest(field: Field, run: Path) -> None:
    with open(run / STEP / "manifest.json", "r+b") as file:
        file.truncate(20_000_000_000)


def _shard_cases() -> Iterator[Case]:
    def pickled(field: Field) -> bytes:
        return pickle.dumps({"module": Evil(os.mkdir, str(field.executed))})

    def zipped(field: Field) -> bytes:
        buffer = io.BytesIO()
        torch.save({"module": {"x": Evil(os.mkdir, str(field.executed))}}, buffer)
        return buffer.getvalue()

    def legacy(field: Field) -> bytes:
        buffer = io.BytesIO()
        torch.save(
            {"module": Evil(os.mkdir, str(field.executed))}, buffer, _use_new_zipfile_serialization=False
        )
        return buffer.getvalue()

    def nothing(field: Field) -> bytes:
        return b""

    def numbers(field: Field) -> bytes:
        buffer = io.BytesIO()
        torch.save({"module": 7, "optimizer_state_dict": 7}, buffer)
        return buffer.getvalue()

    for name, content in {
        "plain code": pickled,
        "zipped code": zipped,
        "legacy code": legacy,
        "nothing": nothing,
        "numbers": numbers,
    }.items():
        for command in _COMMANDS:

            def weights(field: Field, run: Path, content: Callable[[Field], bytes] = content) -> None:
                replace_file(run / STEP, "mp_rank_00_model_states.pt", content(field))

            # a LoRA run resumes from its base and its fragments: it can do without the weights of the step
            codes = (0, 2) if command == "resume" else (2,)
            yield _case(f"weights of a step, {name}", command, weights, codes=codes)

        def optimizer(field: Field, run: Path, content: Callable[[Field], bytes] = content) -> None:
            (shard,) = (run / STEP).glob("fragments_rank_*.pt")
            replace_file(run / STEP, shard.name, content(field))

        yield _case(f"optimizer of a step, {name}", "resume", optimizer)


_CLIENT_STATES: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[1]",
    "brackets": b"[" * 100_000,
    "nothing of ours": b"{}",
    "not utf-8": b"\xff\xfe{}",
    "configuration of numbers": b'{"config": 7, "counters": {}, "skipped": 0}',
    "escapes": b'{"config": {"\\u001b[2J": 1}, "counters": {}}',
}
_CHANGES: dict[str, dict[str, object]] = {
    "no counters": {"counters": None},
    "counters of texts": {"counters": {"cur_scale": "many"}},
    "counters beyond all": {"counters": {"cur_scale": 10**400}},
    "skipped many": {"skipped": "many"},
    "a loss of a list": {"loss_sum": [1]},
}


def _client_state_cases() -> Iterator[Case]:
    for name, content in _CLIENT_STATES.items():

        def raw(field: Field, run: Path, content: bytes = content) -> None:
            replace_file(run / STEP, CLIENT_STATE, content)

        yield _case(f"client state, {name}", "resume", raw)
    for name, change in _CHANGES.items():

        def changed(field: Field, run: Path, change: dict[str, object] = change) -> None:
            body = json.loads((run / STEP / CLIENT_STATE).read_text())
            replace_file(run / STEP, CLIENT_STATE, json.dumps({**body, **change}).encode())

        yield _case(f"client state, {name}", "resume", changed)


def _without_manifest(name: str, content: bytes = b"x") -> Callable[[Field, Path], object]:
    def prepare(field: Field, run: Path) -> None:
        (run / STEP / "manifest.json").unlink()
        (run / STEP / name).write_bytes(content)

    return prepare


def _other_step(name: str) -> Callable[[Field, Path], object]:
    def prepare(field: Field, run: Path) -> None:
        (run / STEP).rename(run / name)
        (run / "latest").write_text(name)

    return prepare


def _latest(content: bytes) -> Callable[[Field, Path], object]:
    def prepare(field: Field, run: Path) -> None:
        (run / "latest").write_bytes(content.replace(b"{outside}", str(field.outside).encode()))
        (run / STEP / "manifest.json").unlink()
        (run / STEP).rename(run / "77")

    return prepare


_LAYOUTS = {
    "rank 9999999999": _without_manifest("mp_rank_9999999999_model_states.pt"),
    "data rank 9999999999": _without_manifest("fragments_rank_9999999999.pt"),
    "rank of 200 digits": _without_manifest(f"mp_rank_{'9' * 200}_model_states.pt"),
    "rank of other digits": _without_manifest("mp_rank_٣_model_states.pt"),
    "latest upwards": _latest(b"../../outside"),
    "latest absolute": _latest(b"{outside}"),
    "latest of NULs": _latest(b"\0" * 10),
    "latest of escapes": _latest(b"\x1b[2J"),
    "latest of many letters": _latest(b"9" * 100_000),
    "latest of bytes": _latest(b"\xff\xfe"),
    "latest of nothing": _latest(b""),
}
# A step is what its manifest says, or it is none: either is right.
_STEPS = {
    "a step of superscript": _other_step("²"),
    "a step of other digits": _other_step("١"),
    "a step of zeros": _other_step("001"),
    "a step of 200 digits": _other_step("9" * 200),
}


def _layout_cases() -> Iterator[Case]:
    for command in ("load", "sample", "convert"):
        for name, prepare in _LAYOUTS.items():
            yield _case(name, command, prepare)
    for name, prepare in _STEPS.items():
        for command in ("resume", "convert"):
            yield _case(name, command, prepare, codes=(0, 2))


_RESOLVED = {
    "a reference": "args: {{sampler: '${{oc.env:SECRET_TOKEN}}'}}",
    "a nested reference": "args: {{mode: env, sampler: '${{oc.${{args.mode}}:SECRET_TOKEN}}'}}",
    "a code tag": 'args: !!python/object/apply:os.mkdir ["{executed}"]',
    "a target": "model: {{network_config: {{target: os.system, params: {{hidden_size: 128}}}}}}",
    "brackets": "args: " + "[" * 100_000,
    "a long number": "args: {{seed: " + "9" * 5000 + "}}",
    "a base of the secret": "base: {secret}",
    "a base of a device": "base: /dev/zero",
    "a huge model": "model: {{network_config: {{params: {{hidden_size: 99999999936, num_layers: 999}}}}}}",
    "escapes": 'args: {{"\\x1b[2J": 1}}',
    "hub weights": "model: {{first_stage_config: {{params: {{ckpt_path: 'http://127.0.0.1:{port}/v'}}}}}}",
}
_RESOLVED_FILES: dict[str, Callable[[Field, Path], object]] = {
    "a FIFO": lambda field, path: os.mkfifo(path),
    "a device": lambda field, path: path.symlink_to("/dev/zero"),
    "the secret": lambda field, path: path.symlink_to(field.secret),
    "a folder": lambda field, path: path.mkdir(),
}


def _resolved_cases() -> Iterator[Case]:
    for name, text in _RESOLVED.items():
        for command in ("sample", "convert"):

            def prepare(field: Field, run: Path, text: str = text) -> None:
                filled = text.format(executed=field.executed, secret=field.secret, port=field.port)
                (run / "resolved.yaml").write_text(filled)

            codes = (0, 2) if name.startswith("a base") else (2,)  # a run's own file has none: not looked at
            yield _case(f"resolved.yaml with {name}", command, prepare, codes=codes)
    for name, place in _RESOLVED_FILES.items():
        for command in ("sample", "convert"):
            yield _case(
                f"resolved.yaml is {name}",
                command,
                lambda field, run, place=place: place(field, _put(run, "resolved.yaml")),
            )

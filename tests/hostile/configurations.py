"""Hostile YAML and command lines."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.hostile.case import Case, Field

SFT = ["--base", "configs/sft.yaml", "hostile.yaml"]
_COMMANDS = {
    "check": ["check", *SFT],
    "train": [
        "train",
        *SFT,
        "args.train_iters=1",
        "args.eval_interval=null",
        "args.valid_video_interval=null",
    ],
    "precompute": ["precompute", *SFT, "args.train_iters=1", "data.cache_dir=cache"],
    "sample": ["sample", "--base", "configs/sample.yaml", "hostile.yaml", "args.prompt=x"],
    "inspect": ["data", "inspect", *SFT],
}

_REFERENCES = {
    "plain": "${oc.env:SECRET_TOKEN}",
    "with default": "${oc.env:SECRET_TOKEN,none}",
    "spaces": "${ oc.env : SECRET_TOKEN }",
    "name in name": "${oc.${args.wandb_project_name}:SECRET_TOKEN}",
    "name of name": "${${args.wandb_project_name}:SECRET_TOKEN}",
    "in a text": "before ${oc.env:SECRET_TOKEN} after",
    "twice": "${oc.env:${oc.env:SECRET_TOKEN}}",
    "decode": "${oc.decode:'${oc.env:SECRET_TOKEN}'}",
    "create": "${oc.create:{a: '${oc.env:SECRET_TOKEN}'}}",
    "select": "${oc.select:args.x,'${oc.env:SECRET_TOKEN}'}",
    "dict": "${oc.dict.values:args}",
    "deprecated": "${oc.deprecated:args.lr}",
    "brackets": "${args[${oc.env:SECRET_TOKEN}]}",
    "escaped once": "\\\\${oc.env:SECRET_TOKEN}",
    "escaped twice": "\\\\\\\\${oc.env:SECRET_TOKEN}",
    "relative": "${..${oc.env:SECRET_TOKEN}}",
    "unclosed": "${oc.env:SECRET_TOKEN",
}
_PLACES = {
    "name": 'args: {{wandb_project_name: env, experiment_name: "{}"}}',
    "prompts": 'args: {{wandb_project_name: env, valid_prompts: ["{}"]}}',
    "data": 'args: {{wandb_project_name: env, train_data: ["http://127.0.0.1:{{port}}/{}.tar"]}}',
    "model": "args: {{wandb_project_name: env}}\n"
    'model: {{first_stage_config: {{params: {{ckpt_path: "{}"}}}}}}',
}
_TAGS = {
    "system": 'args: !!python/object/apply:os.system ["touch {executed}"]',
    "new": "args: !!python/object/new:os.system [touch {executed}]",
    "name": "args: {{lr: !!python/name:os.system}}",
    "module": "args: {{lr: !!python/module:os}}",
    "int": "args: {{seed: !!int abc}}",
    "float": "args: {{lr: !!float abc}}",
    "binary": "args: {{experiment_name: !!binary %%%}}",
    "timestamp": "args: {{seed: !!timestamp never}}",
    "own": "args: !evil {{a: 1}}",
    "set": "args: !!set {{lr}}",
    "omap": "args: !!omap [lr: 1]",
}
_TARGETS = {
    "network": "model: {{network_config: {{target: {}, params: {{}}}}}}",
    "first stage": "model: {{first_stage_config: {{target: {}, params: {{}}}}}}",
    "sampler": "model: {{sampler_config: {{target: {}}}}}",
    "data": "data: {{target: {}}}",
    "optimizer": "deepspeed: {{optimizer: {{type: {}}}}}",
    "hydra": "model: {{_target_: {}}}",
    "plugins": "args: {{plugins: [{}]}}",
    "dataset": "data: {{params: {{_target_: {}}}}}",
}
_CALLABLES = ("os.system", "subprocess.Popen", "builtins.eval", "logging.os.system", "sat.x", "torch.load")
_NAMES = {
    "up": "../../outside/victim",
    "absolute": "{outside}/run",
    "line break": "a\\nb",
    "escape": "a\\x1b[2Jb",
    "hidden": ".ssh",
    "slash": "a/b",
    "long": "a" * 5000,
    "nul": "a\\0b",
    "surrogate": "a\\ud800b",
    "direction": "a\\u202eb",
}
_TEXTS = {
    "laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "itself": "args: &a {lr: *a}",
    "deep brackets": "args: " + "[" * 100_000,
    "deep mappings": "args: " + "{a: " * 5_000 + "1" + "}" * 5_000,
    "deep references": "args: {" + ", ".join(f"a{i}: ${{args.a{i + 1}}}" for i in range(3_000)) + "}",
    "circle": "args: {experiment_name: '${args.wandb_project_name}', "
    "wandb_project_name: '${args.experiment_name}'}",
    "long number": "args: {seed: " + "9" * 5_000 + "}",
    "long float": "args: {lr: 1e" + "9" * 400 + "}",
    "inf": "args: {lr: .inf}",
    "nan": "args: {lr: .nan}",
    "hex": "args: {seed: 0x" + "f" * 5_000 + "}",
    "many keys": "args: {" + ", ".join(f"k{i}: 1" for i in range(50_000)) + "}",
    "twice": "args: {lr: 1}\nargs: {lr: 2}",
    "two documents": "args: {lr: 1}\n---\nargs: {lr: 2}",
    "merge key": "x: &x {lr: 1}\nargs: {<<: *x, <<: [*x, *x]}",
    "list key": "? [a, b]\n: 1",
    "number keys": "args: {1: 2, 2.5: 3, null: 4, true: 5}",
    "dotted key": 'args: {"x.y": "${args.lr}"}',
    "superscript": "model: {conditioner_config: {params: {emb_models: {²: 1}}}}",
    "huge place": "model: {conditioner_config: {params: {emb_models: {999999999999: {target: x}}}}}",
    "scalar": "just text",
    "list": "[1, 2]",
    "empty sections": "args: 5\nmodel: []\ndata: x\ndeepspeed: 1.5",
    "monitor": "deepspeed: {tensorboard: {enabled: true, output_path: ../outside}}",
    "csv monitor": "deepspeed: {csv_monitor: {enabled: true, output_path: ../outside}}",
    "nebula": "deepspeed: {nebula: {enabled: true, persistent_storage_path: ../outside}}",
    "by string": "deepspeed: {torch_autocast: {enabled: true, lower_precision_safe_modules: [os.system]}}",
    "escapes in key": 'args: {"\\x1b]0;owned\\x07": 1}',
    "escapes in value": 'args: {mode: "\\x1b[2J\\x9b31m"}',
    "direction in key": 'args: {"l\\u202er": 1}',
    "huge brace range": "args: {train_data: ['{0..99999999999}.tar']}",
    "many braces": "args: {train_data: ['" + "{a,b}" * 40 + ".tar']}",
    "wide wildcard": "args: {train_data: ['/**/**/**/*.tar']}",
    "tab": "args:\n\tlr: 1",
    "nul": "args: {experiment_name: a\0b}",
    "paths": "args: {train_data: ['" + "a/" * 3_000 + "']}",
}
_BYTES = {
    "not utf-8": b"args: {experiment_name: \xff\xfe}",
    "utf-16": "args: {lr: 1}".encode("utf-16"),
    "surrogates": b"args: {experiment_name: \xed\xa0\x80}",
    "binary": bytes(range(256)) * 40,
    "nothing": b"\0" * 4096,
}


def cases() -> Iterator[Case]:
    """Gives all hostile configurations."""
    yield from _reference_cases()
    for name, text in _TAGS.items():
        yield _yaml(f"tag {name}", text, "check")
        yield _yaml(f"tag {name}", text, "train")
    for place, text in _TARGETS.items():
        for target in _CALLABLES:
            yield _yaml(f"target {target} as {place}", text.format(target), "check", formatted=True)
    for name, value in _NAMES.items():
        yield _yaml(f"run name {name}", f'args: {{{{experiment_name: "{value}"}}}}', "train")
    for name, text in _TEXTS.items():
        yield _yaml(f"text {name}", text, "check", formatted=True)
    for name, content in _BYTES.items():
        yield _bytes(f"bytes {name}", content)
    yield from _files()
    yield from _words()


def _reference_cases() -> Iterator[Case]:
    commands = list(_COMMANDS)
    number = 0
    for name, reference in _REFERENCES.items():
        for place, text in _PLACES.items():
            command = commands[number % len(commands)]
            number += 1
            yield _yaml(f"reference {name} in {place}", text.format(reference), command, formatted=True)


def _yaml(name: str, text: str, command: str, *, formatted: bool = False) -> Case:
    def make(field: Field) -> list[str]:
        filled = text if formatted else text.format(executed=field.executed, outside=field.outside)
        filled = filled.replace("{port}", str(field.port))
        (field.inside / "hostile.yaml").write_bytes(filled.encode("utf-8", "surrogatepass"))
        return _COMMANDS[command]

    return Case(f"yaml: {name}, {command}", make)


def _bytes(name: str, content: bytes) -> Case:
    def make(field: Field) -> list[str]:
        (field.inside / "hostile.yaml").write_bytes(content)
        return _COMMANDS["check"]

    return Case(f"yaml: {name}", make)


def _files() -> Iterator[Case]:
    def fifo(field: Field) -> None:
        os.mkfifo(field.inside / "hostile.yaml")

    def sparse(field: Field) -> None:
        with open(field.inside / "hostile.yaml", "wb") as file:
            file.truncate(20_000_000_000)

    def link(to: str) -> object:
        return lambda field: (field.inside / "hostile.yaml").symlink_to(to.format(secret=field.secret))

    def text(content: str) -> object:
        return lambda field: (field.inside / "hostile.yaml").write_text(
            content.format(secret=field.secret, port=field.port)
        )

    def chain(field: Field) -> None:
        for number in range(2_000):
            (field.inside / f"{number}.yaml").write_text(f"base: {number + 1}.yaml")
        (field.inside / "hostile.yaml").write_text("base: 0.yaml")

    made = {
        "fifo": fifo,
        "sparse": sparse,
        "device": link("/dev/zero"),
        "memory": link("/proc/self/mem"),
        "secret": link("{secret}"),
        "itself": link("hostile.yaml"),
        "folder": lambda field: (field.inside / "hostile.yaml").mkdir(),
        "base secret": text("base: {secret}"),
        "base device": text("base: /dev/zero"),
        "base url": text("base: http://127.0.0.1:{port}/a.yaml"),
        "base list of numbers": text("base: [1, 2]"),
        "base chain": chain,
        "base passwords": text("base: /etc/passwd"),
    }
    for name, prepare in made.items():
        for command in ("check", "train"):

            def make(field: Field, prepare: object = prepare, command: str = command) -> list[str]:
                prepare(field)  # type: ignore[operator]
                return _COMMANDS[command]

            yield Case(f"file: {name}, {command}", make)


def _words() -> Iterator[Case]:
    words = {
        "reference": ["args.experiment_name=${oc.env:SECRET_TOKEN}"],
        "nested reference": [
            "args.wandb_project_name=env",
            "args.experiment_name=${oc.${args.wandb_project_name}:SECRET_TOKEN}",
        ],
        "tag": ["args.lr=!!python/name:os.system"],
        "deep": ["args.lr=" + "[" * 50_000],
        "long number": ["args.seed=" + "9" * 5_000],
        "surrogate": ["args.experiment_name=\udcff"],
        "escape": ["args.\x1b[2J=1"],
        "long path": ["args.load=" + "a" * 5_000],
        "no key": ["=1", "..=2", "args..lr=3"],
        "many": [f"args.k{number}=1" for number in range(1_000)],
    }
    for name, extra in words.items():
        yield Case(
            f"words: {name}", lambda field, extra=extra: ["check", "--base", "configs/sft.yaml", *extra]
        )

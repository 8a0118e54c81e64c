"""Configurations that a seeded generator makes: each asks in some places for code, a file or an address.

Every second one is read with an extension loaded, whose parts take settings of their own. Files that would do
damage when they are imported lie where Python could find them, and next to the parts of the extension, whose
builder `check` must not import.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.hostile.case import Case, Field

COUNT = 500
_BASE = ["--base", "configs/sft.yaml", "hostile.yaml"]
_ALMOST = ["args.train_iters=1", "args.eval_interval=null", "args.valid_video_interval=null"]
_COMMANDS = {
    "check": ["check", *_BASE],
    "train": ["train", *_BASE, *_ALMOST],
    "sample": ["sample", "--base", "configs/sample.yaml", "hostile.yaml", "args.prompt=x"],
    "precompute": ["precompute", *_BASE, "args.train_iters=1", "data.cache_dir=cache"],
    "inspect": ["data", "inspect", *_BASE],
}
_TRAP = "import pathlib\npathlib.Path({executed!r}).write_text('x')\n"
_EXTENSION = '''
"""Parts with settings of each type, for configurations that ask them for more."""
from sat_train.parts import CallbackParams, ConditionParams, Field, LossTermParams, ModuleParams
from sat_train.parts import TimestepsParams, WeightsFile, part

@part("condition", "ProbeCondition", build=".network:Probe")
class ProbeConditionParams(ConditionParams):
    """A condition."""
    text: str = Field("", description="A text.")
    weights: WeightsFile | None = Field(None, description="A file of weights.")

@part("module", "ProbeModule", build=".network:Probe")
class ProbeModuleParams(ModuleParams):
    """A module."""
    number: float = Field(1.0, description="A number.")

@part("loss_term", "ProbeTerm", build=".network:Probe")
class ProbeTermParams(LossTermParams):
    """A term."""
    number: int = Field(1, description="A number.")

@part("timesteps", "ProbeLaw", build=".network:Probe")
class ProbeLawParams(TimestepsParams):
    """A law."""
    number: float = Field(1.0, description="A number.")

@part("callback", "ProbeCallback", build=".network:Probe")
class ProbeCallbackParams(CallbackParams):
    """A callback."""
    text: str = Field("", description="A text.")
'''
# Keys at which YAML names a part, and names of parts that only an extension has.
_SLOTS = {
    "model.network_config.target": (),
    "model.first_stage_config.target": (),
    "model.sampler_config.target": (),
    "model.sampler_config.params.guider_config.target": (),
    "model.loss_fn_config.params.sigma_sampler_config.target": ("ProbeLaw",),
    "model.network_config.params.modules.pos_embed_config.target": (),
    "model.network_config.params.modules.lora_config.target": (),
    "model.conditioner_config.params.emb_models.0.target": (),
    "model.conditions.x.target": ("ProbeCondition",),
    "model.modules.x.target": ("ProbeModule",),
    "model.loss_terms.x.target": ("ProbeTerm",),
    "args.callbacks.x.target": ("ProbeCallback",),
    "deepspeed.optimizer.type": (),
    "data.target": (),
    "data.fields.x.kind": (),
}
_KEYS = (
    *("_target_", "_partial_", "_args_", "_recursive_", "__class__", "__reduce__", "__init__", "build"),
    *("builder", "class_path", "callable", "factory", "module", "import", "imports", "plugins", "extension"),
    *(
        "python",
        "code",
        "eval",
        "exec",
        "script",
        "command",
        "hook",
        "on_start",
        "defaults",
        "hydra",
        "resolvers",
    ),
)
_GROUPS = (
    *("args", "model", "data", "deepspeed", "data.params", "model.network_config", "model.sampler_config"),
    *("model.sampler_config.params", "model.loss_fn_config.params", "model.first_stage_config.params"),
    *("model.network_config.params.modules", "deepspeed.optimizer.params", "model.denoiser_config.params"),
)
_CALLABLES = (
    *(
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "subprocess.check_output",
        "builtins.exec",
        "builtins.eval",
    ),
    *(
        "importlib.import_module",
        "runpy.run_path",
        "pickle.loads",
        "torch.load",
        "torch.hub.load",
        "shutil.rmtree",
    ),
    *(
        "urllib.request.urlopen",
        "socket.create_connection",
        "ctypes.CDLL",
        "sys.exit",
        "os._exit",
        "webbrowser.open",
    ),
    *(
        "evil.run",
        "evil:run",
        "evil",
        ".evil:run",
        "evil_package.run",
        "evil_package",
        "./evil.py",
        "../inside/evil.py",
    ),
    *("{inside}/evil.py:run", "probe.network:Probe", ".network:Probe", "probe:ProbeModuleParams", "probe"),
    *(
        "sat_train.cli.main.main",
        "sat_train.parts.part",
        "lambda: 0",
        "__import__('os').system('true')",
        "tests.forks",
    ),
)
_RESOLVERS = (
    *(
        "oc.env:SECRET_TOKEN",
        "env:SECRET_TOKEN",
        "oc.decode:'1'",
        "oc.create:{a: 1}",
        "eval:1+1",
        "python:evil",
    ),
    *("cmd:touch {executed}", "shell:touch {executed}", "file:{secret}", "include:{secret}", "load:{secret}"),
    *(
        "http://127.0.0.1:{port}/x",
        "oc.dict.keys:args",
        "oc.select:args.lr",
        "now:%Y",
        "hydra:runtime.cwd",
        "..lr",
    ),
    *(
        "args.${{args.mode}}",
        "${{args.mode}}:SECRET_TOKEN",
        "args.__class__",
        "args[0]",
        "",
        "args.lr",
        "model",
    ),
)
_TAGS = (
    *(
        "python/object/apply:os.system",
        "python/object/new:os.system",
        "python/name:os.system",
        "python/module:evil",
    ),
    *(
        "python/object:evil.Thing",
        "python/tuple",
        "python/none",
        "python/object/apply:evil.run",
        "include",
        "env",
    ),
    *("file", "exec", "pickle", "java.lang.Runtime", "ruby/object:Gem::Installer", "binary", "set", "omap"),
)


def cases() -> Iterator[Case]:
    """Gives the configurations, each by its number."""
    for number in range(COUNT):
        yield _case(number)


def _case(number: int) -> Case:
    dice = random.Random(f"hostile configuration {number}")
    with_extension = number % 2 == 1
    # one in ten by a command that would do more than check
    command = dice.choice(list(_COMMANDS)) if number % 10 < 2 else "check"
    asks = [_ask(dice, with_extension) for _ in range(dice.randint(1, 4))]

    def make(field: Field) -> list[str]:
        set_traps(field)
        names = {
            "inside": field.inside,
            "executed": field.executed,
            "secret": field.secret,
            "port": field.port,
        }
        text = "\n".join(f"{key}: {value}" for key, value in _merge(asks).items())
        (field.inside / "hostile.yaml").write_text(_filled(text, names))
        extension = ["--extension", "probe"] if with_extension else []
        first, *rest = _COMMANDS[command]
        return [first, *rest[:1], *extension, *rest[1:]] if first == "data" else [first, *extension, *rest]

    what = "with an extension" if with_extension else "alone"
    return Case(f"generated: {number} {what}, {command}", make, opens_nothing=True)


def set_traps(field: Field) -> None:
    """Writes the extension, and files that leave `executed` behind when they are imported."""
    trap = _TRAP.format(executed=str(field.executed))
    for name in ("evil.py", "evil_package/__init__.py", "probe/network.py", "sitecustomize.py"):
        (field.inside / name).parent.mkdir(exist_ok=True)
        (field.inside / name).write_text(trap)
    (field.inside / "probe" / "__init__.py").write_text(_EXTENSION)


def _filled(text: str, names: dict[str, Any]) -> str:
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


Ask = tuple[str, str]  # a dotted key, and YAML in flow style


def _ask(dice: random.Random, with_extension: bool) -> Ask:
    asks: tuple[Callable[[random.Random, bool], Ask], ...] = (
        *(_named_part, _named_part, _unknown_key, _unknown_key),
        *(_reference, _tag, _alias, _setting, _recorded_extension),
    )
    return dice.choice(asks)(dice, with_extension)


def _named_part(dice: random.Random, with_extension: bool) -> Ask:
    return dice.choice(list(_SLOTS)), _quoted(dice.choice(_CALLABLES), dice)


def _unknown_key(dice: random.Random, with_extension: bool) -> Ask:
    group, key = dice.choice(_GROUPS), dice.choice(_KEYS)
    value = _quoted(dice.choice(_CALLABLES), dice)
    if dice.random() < 0.4:
        value = f"{{_target_: {value}, args: [{_quoted('touch {executed}', dice)}]}}"
    return f"{group}.{key}", value


def _reference(dice: random.Random, with_extension: bool) -> Ask:
    text = "${" + dice.choice(_RESOLVERS) + "}"
    if dice.random() < 0.3:
        before, behind = dice.choice([("\\\\", ""), ("x", "y"), ("${oc.env:", "}"), ("${oc.env:HOME}", "")])
        text = f"{before}{text}{behind}"
    keys = ("experiment_name", "load", "lr", "valid_prompts", "save")
    return f"args.{dice.choice(keys)}", json.dumps(text)


def _tag(dice: random.Random, with_extension: bool) -> Ask:
    tag = dice.choice(_TAGS)
    mark = dice.choice([f"!!{tag}", f"!{tag}", f"!<tag:yaml.org,2002:{tag}>"])
    value = dice.choice(["[touch {executed}]", "{a: 1}", "'{executed}'", "'{secret}'"])
    return dice.choice(["args.lr", "args.experiment_name", "model.x", "args.train_data"]), f"{mark} {value}"


def _alias(dice: random.Random, with_extension: bool) -> Ask:
    callable_ = _quoted(dice.choice(_CALLABLES), dice)
    shapes = (
        f"{{a: &a {{_target_: {callable_}}}, b: *a, c: {{<<: *a}}}}",
        "&a {b: *a}",
        f"{{a: &a [{callable_}], b: &b [*a, *a], c: &c [*b, *b], d: [*c, *c]}}",
    )
    return f"{dice.choice(_GROUPS)}.x", dice.choice(shapes)


def _setting(dice: random.Random, with_extension: bool) -> Ask:
    """Asks a part of the extension for a setting that it does not have; without it, for the part."""
    place = dice.choice([key for key, names in _SLOTS.items() if names])
    target, group = _SLOTS[place][0], place.removesuffix(".target")
    key = dice.choice(_KEYS)
    value = _quoted(dice.choice(_CALLABLES), dice)
    return group, f"{{target: {target}, params: {{{key}: {value}}}}}"


def _recorded_extension(dice: random.Random, with_extension: bool) -> Ask:
    """Pretends that a run was trained with an extension; YAML loads none."""
    name = dice.choice(["evil", "evil_package", "./evil.py", "{inside}/evil.py", "os", "probe.network"])
    shapes = (
        f"{{{json.dumps(name)}: {{version: '1', files: [x]}}}}",
        json.dumps(name),
        f"[{json.dumps(name)}]",
    )
    return "extensions", dice.choice(shapes)


def _quoted(text: str, dice: random.Random) -> str:
    """Returns a text in YAML, in one of its notations."""
    is_plain = text.replace(".", "").replace("_", "").isalnum()
    return text if is_plain and dice.random() < 0.5 else json.dumps(text)


def _merge(asks: list[Ask]) -> dict[str, str]:
    """Returns the sections of a file: of keys that lie within one another, the first alone."""
    tree: dict[str, Any] = {}
    for key, value in asks:
        *groups, leaf = key.split(".") if key != "extensions" else [key]
        node: Any = tree
        for group in groups:
            node = node.setdefault(group, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.setdefault(leaf, value)
    return {key: _flow(value) for key, value in tree.items()}


def _flow(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "{" + ", ".join(f"{json.dumps(key)}: {_flow(item)}" for key, item in value.items()) + "}"

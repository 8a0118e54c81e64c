"""The command line: `--base` files, `key.path=value` words and SAT's flags."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml.error import YAMLError

from sat_train.config.catalog import suggest_value
from sat_train.config.legacy import reason_without_effect
from sat_train.config.schema.args import ArgsConfig
from sat_train.errors import Fault

COMMAND_LINE = "command line"
_WORD = re.compile(r"^[A-Za-z_]\w*(\.[\w-]+)*=")
_BOOLEANS = {"true": True, "false": False}


def split_command_line(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates the files after `--base` from all other words.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The files in order, and the other words in order.
    """
    files: list[str] = []
    words: list[str] = []
    in_base = False
    for word in argv:
        if word == "--base" or word.startswith("--base="):
            in_base = True
            files += [word[len("--base=") :]] if "=" in word else []
        elif in_base and not word.startswith("-") and not _WORD.match(word):
            files.append(word)
        else:
            in_base = False
            words.append(word)
    return files, words


def read_words(words: Sequence[str], faults: list[Fault]) -> dict[str, Any]:
    """Returns the tree that the words of a command line describe.

    Args:
        words: `key.path=value` words and SAT flags such as `--train-iters 10`.
        faults: Gets what cannot be understood.
    """
    tree: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, value = _read_flag(word, rest, faults)
        elif _WORD.match(word):
            key, text = word.split("=", 1)
            value = _read_value(key, text, faults)
        else:
            faults.append(Fault(word, "", "a word `key.path=value` or a flag `--name value`", COMMAND_LINE))
            continue
        if key:
            _put(tree, key.split("."), value)
    return tree


def _read_flag(word: str, rest: list[str], faults: list[Fault]) -> tuple[str, Any]:
    name, equals, text = word[2:].partition("=")
    key = name.replace("-", "_")
    field = ArgsConfig.model_fields.get(key)
    if field is None and not reason_without_effect(f"args.{key}"):
        near = suggest_value(key, list(ArgsConfig.model_fields))
        suggestion = f"--{near.replace('_', '-')}" if near else ""
        faults.append(Fault(f"--{name}", "", "a flag that exists", COMMAND_LINE, suggestion))
        _take_values(rest)
        return "", None
    if equals:
        return f"args.{key}", _read_value(f"args.{key}", text, faults)
    if field is None or field.annotation is bool:
        takes = bool(rest) and (rest[0].lower() in _BOOLEANS or (field is None and _is_value(rest[0])))
        return f"args.{key}", (_BOOLEANS.get(rest.pop(0).lower(), True) if takes else True)
    if _holds_tuple(field.annotation):
        values = [_read_scalar(f"args.{key}", text, faults) for text in _take_values(rest)]
        return f"args.{key}", values
    if not rest or rest[0].startswith("--"):
        faults.append(Fault(f"--{name}", "", "a value after it", COMMAND_LINE))
        return "", None
    return f"args.{key}", _read_value(f"args.{key}", rest.pop(0), faults)


def _is_value(word: str) -> bool:
    return not word.startswith("--") and not _WORD.match(word)


def _take_values(rest: list[str]) -> list[str]:
    taken: list[str] = []
    while rest and _is_value(rest[0]):
        taken.append(rest.pop(0))
    return taken


def _holds_tuple(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is tuple or any(map(_holds_tuple, get_args(annotation)))


def _holds_one_text(annotation: Any) -> bool:
    """Tells whether a setting is a free text, such as a prompt, which must not be read as YAML."""
    if get_origin(annotation) is tuple:
        return False
    is_optional = get_origin(annotation) in (Union, types.UnionType)
    return str in (annotation, *get_args(annotation)) or (
        is_optional and any(_holds_one_text(inner) for inner in get_args(annotation))
    )


def _read_value(key: str, text: str, faults: list[Fault]) -> Any:
    field = ArgsConfig.model_fields.get(key.removeprefix("args.")) if key.startswith("args.") else None
    if field is not None and _holds_one_text(field.annotation):
        return None if text == "null" else text
    return _read_scalar(key, text, faults)


def _read_scalar(key: str, text: str, faults: list[Fault]) -> Any:
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    except (OmegaConfBaseException, YAMLError):
        faults.append(Fault(key, text, "a value in YAML's notation", COMMAND_LINE))
        return None
    assert isinstance(parsed, dict), f"a dotlist gives a mapping, not {type(parsed)}"
    return parsed["value"]


def _put(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        inner = tree.get(part)
        tree[part] = inner if isinstance(inner, dict) else {}
        tree = tree[part]
    tree[parts[-1]] = value

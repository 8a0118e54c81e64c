"""The command line: `--base` files, `key.path=value` words and SAT's flags."""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin

from sat_train.config.catalog import suggest_key
from sat_train.config.legacy import reason_without_effect
from sat_train.config.schema.args import ArgsConfig
from sat_train.config.values import COMMAND_LINE as COMMAND_LINE
from sat_train.config.yaml_text import WANTED_REFERENCE, NotPlain, parse_value
from sat_train.errors import Fault

WANTED_BASE = "`--base` in front of a YAML file"
_WORD = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=", re.ASCII)
# SAT's flags without a value whose settings have more choices here
_SAT_SWITCHES = ("checkpoint_activations",)
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


def read_words(words: Sequence[str], faults: list[Fault]) -> list[dict[str, Any]]:
    """Returns the trees that the words of a command line describe, one per word; later ones win.

    Args:
        words: `key.path=value` words and SAT flags such as `--train-iters 10`.
        faults: Receives what cannot be parsed.
    """
    trees: list[dict[str, Any]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, value = _read_flag(word, rest, faults)
        elif _WORD.match(word):
            key, text = word.split("=", 1)
            value = _read_value(key, text, faults)
        else:
            is_file = word.lower().endswith((".yaml", ".yml"))
            expected = WANTED_BASE if is_file else "a word `key.path=value` or a flag `--name value`"
            faults.append(Fault(word, "", expected, COMMAND_LINE, f"--base {word}" if is_file else ""))
            continue
        if key:
            for part in reversed(key.split(".")):
                value = {part: value}
            trees.append(value)
    return trees


def _read_flag(word: str, rest: list[str], faults: list[Fault]) -> tuple[str, Any]:
    name, equals, text = word[2:].partition("=")
    key = name.replace("-", "_")
    field = ArgsConfig.model_fields.get(key)
    if field is None and not reason_without_effect(f"args.{key}"):
        faults.append(Fault(f"--{name}", "", "a flag that exists", COMMAND_LINE, _suggest_flag(key)))
        _take_values(rest)
        return "", None
    if equals:
        return f"args.{key}", _read_value(f"args.{key}", text, faults)
    if key in _SAT_SWITCHES and not (rest and _is_value(rest[0])):
        return f"args.{key}", True
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


def _suggest_flag(name: str) -> str:
    near = suggest_key(f"args.{name}")
    section, _, leaf = near.rpartition(".")
    if section in ("", "args"):
        return f"--{leaf.replace('_', '-')}" if leaf else ""
    return f"{near}=..."


def _is_value(word: str) -> bool:
    return not word.startswith("--") and not _WORD.match(word)


def _take_values(rest: list[str]) -> list[str]:
    values: list[str] = []
    while rest and _is_value(rest[0]):
        values.append(rest.pop(0))
    return values


def _holds_tuple(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is tuple or any(map(_holds_tuple, get_args(annotation)))


def _holds_one_text(annotation: Any) -> bool:
    """Returns whether a setting is a free text, such as a prompt, which must not be read as YAML."""
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
        return parse_value(text)
    except NotPlain as problem:
        is_reference = problem.expected == WANTED_REFERENCE
        expected = problem.expected if is_reference else f"a value in YAML's notation: {problem.expected}"
        faults.append(Fault(key, text, expected, COMMAND_LINE))
        return None

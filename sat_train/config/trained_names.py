"""Names of what trains in forks of CogVideo's `sat/`: `trainable_modules` and `train_prefix`.

Both train what they name and freeze the rest, where `model.not_trainable_prefixes` names what is frozen. They
become `model.freeze` of everything and a rule of `model.train`, which train the same weights. Names there
begin at the whole engine, with `model.diffusion_model.` for the transformer.

Source: alibaba/Tora@9a23dce `sat/diffusion_video.py`, fudan-generative-vision/hallo3@e342dce
`hallo3/diffusion_video.py`, `disable_untrainable_params` of both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic_core import PydanticUndefined

from sat_train.config.aliases import get_value, remove_value
from sat_train.config.layers import Merged
from sat_train.errors import Fault

_ENGINE = "model.diffusion_model."
_EVERYTHING = "."
_BEGINNING = re.compile(r"^(\^?model\\?\.)?diffusion_model\\?\.")
_OWNER = r".*\.[^.]*$"  # the rest of a name behind what was found in the name of its module
_WANTED_PREFIXES = "a mapping of words in names to lists of words, as in hallo3: {model: [audio]}"
_WANTED_PATTERNS = (
    "a list of regular expressions of the names of modules, which begin with `model.`, as in Tora: [fuser]"
)


def translate_trained_names(merged: Merged, faults: list[Fault]) -> None:
    """Turns the two keys, where they are set, into `model.freeze` and `model.train`.

    Args:
        merged: Changed in place, before it is validated.
        faults: Receives values that are none.
    """
    for key, translate, expected in (
        ("train_prefix", _of_prefixes, _WANTED_PREFIXES),
        ("trainable_modules", _of_modules, _WANTED_PATTERNS),
    ):
        path = f"model.{key}"
        value = get_value(merged.tree, path)
        if value is PydanticUndefined:
            continue
        source = merged.source_of(path)
        remove_value(merged, path)
        excluded = _take_excluded(merged, key)
        patterns = translate(value, excluded) if excluded is not None else None
        if patterns is None:
            faults.append(Fault(path, str(value), expected, source))
        else:
            _write(merged, key, patterns, source)


def _take_excluded(merged: Merged, key: str) -> list[str] | None:
    """Returns what the other key of the fork excepts; `trainable_modules` takes prefixes no heed of."""
    path = "model.not_trainable_modules" if key == "trainable_modules" else "model.not_trainable_prefixes"
    value = get_value(merged.tree, path)
    if get_value(merged.tree, "model.not_trainable_prefixes") is not PydanticUndefined:
        remove_value(merged, "model.not_trainable_prefixes")
    if path == "model.not_trainable_modules" and value is not PydanticUndefined:
        remove_value(merged, path)
    return [] if value is PydanticUndefined else _texts(value)


def _of_prefixes(value: Any, excluded: Sequence[str]) -> list[str] | None:
    """Returns patterns of the names that hold both words of a pair, and no word of `excluded`."""
    if not isinstance(value, dict) or any(_texts(words) is None for words in value.values()):
        return None
    pairs = [(str(first), second) for first, words in value.items() for second in _texts(words) or ()]
    without = "".join(f"(?!.*{_word(word)})" for word in excluded)
    return [f"^{without}(?=.*{_word(first)})(?=.*{_word(second)})" for first, second in pairs]


def _of_modules(value: Any, excluded: Sequence[str]) -> list[str] | None:
    """Returns patterns of the weights whose own module has a name that a pattern finds."""
    patterns = _texts(value)
    if patterns is None or not all(map(_is_usable, [*patterns, *excluded])):
        return None
    patterns = ["" if pattern == "all" else pattern for pattern in patterns]
    without = "".join(f"(?!.*{_module(pattern)})" for pattern in excluded)
    return [f"^{without}.*{_module(pattern)}" if without else _module(pattern) for pattern in patterns]


def _word(word: str) -> str:
    """Returns a pattern that finds a word in `model.diffusion_model.` and a name, by that name alone."""
    if word in _ENGINE:
        return ""
    halves = [(word[:cut], word[cut:]) for cut in range(1, len(word))]
    over_the_border = [f"^{re.escape(rest)}" for begun, rest in halves if _ENGINE.endswith(begun)]
    return f"(?:{'|'.join([re.escape(word), *over_the_border])})"


def _module(pattern: str) -> str:
    """Returns a pattern of weights for a pattern of the names of their modules."""
    if pattern.replace("\\.", ".").removeprefix("^") in _ENGINE.rstrip("."):
        return ""  # all of them lie in it
    inner = _BEGINNING.sub("^", pattern)
    if inner.endswith("$") and not inner.endswith(r"\$"):
        return rf"(?:{inner[:-1]})\.[^.]*$"
    return f"(?:{inner}){_OWNER}"


def _is_usable(pattern: str) -> bool:
    if pattern.startswith("^") and not _BEGINNING.match(pattern):
        return False  # no name begins so
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _texts(value: Any) -> list[str] | None:
    values = [value] if isinstance(value, str) else value
    return values if isinstance(values, list) and all(isinstance(each, str) for each in values) else None


def _write(merged: Merged, name: str, patterns: list[str], source: str) -> None:
    model = merged.tree["model"]
    frozen = _texts(model.get("freeze", []))
    rules = model.setdefault("train", {})
    if frozen is None or not isinstance(rules, dict):
        return  # a fault of its own, which `validate` names
    model["freeze"] = [*frozen, _EVERYTHING]
    rules[name] = {"match": patterns}
    for path in ("model.freeze", f"model.train.{name}.match"):
        merged.sources[path] = source
    merged.translated[f"model.{name}"] = f"model.freeze and model.train.{name}"

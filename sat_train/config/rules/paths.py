"""Rules on files and folders that must be there before anything starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sat_train.config.rules.rule import Draft, rule
from sat_train.errors import Fault
from sat_train.patterns import expand_braces, find_local

_PLACEHOLDER = re.compile(r"\{.+\}")
_HUB_NAME = re.compile(r"^[\w-]+/[\w.-]+$")
_RESUME_WORDS = ("auto", "must", "none")
_DATA = ("args.train_data.", "args.valid_data.")


def is_placeholder(path: str) -> bool:
    """Tells whether a preset leaves this path to the person, as in `{folder of CogVideoX-5b}/transformer`.

    `{000..099}` and `{a,b}` are not such braces: they stand for several files.
    """
    return any(_PLACEHOLDER.search(name) for name in expand_braces(path))


def placeholders(draft: Draft) -> list[str]:
    """Returns the paths that are still to be filled in, as `key = value`."""
    return [f"{key} = {path}" for key, path in _needed_paths(draft) if is_placeholder(path)]


@rule()
def needed_paths_exist(draft: Draft) -> Iterator[Fault]:
    for key, path in _needed_paths(draft):
        if is_placeholder(path):
            if draft.purpose != "check":
                yield draft.fault(key, path, "a path in place of the part in braces")
        elif key.startswith(_DATA):
            absent = _absent(path)
            if absent is not None:
                yield draft.fault(key, absent, "a file or folder that exists")
        elif not Path(path).exists() and not (key.endswith("model_dir") and _HUB_NAME.match(path)):
            yield draft.fault(key, path, "a file or folder that exists")


def _absent(entry: str) -> str | None:
    """Returns the first file that an entry of the training data names and that is not there.

    What is on remote storage is looked at when it is read: a configuration is checked without a network.
    """
    if "://" in entry or Path(entry).exists():
        return None
    return next((name for name in expand_braces(entry) if not find_local(name)), None)


def _needed_paths(draft: Draft) -> Iterator[tuple[str, str]]:
    args, is_sampling = draft.args, draft.purpose == "sample"
    if not is_sampling:
        for name in ("train_data", "valid_data"):
            for index, path in enumerate(getattr(args, name) or ()):
                yield f"args.{name}.{index}", path
    if draft.purpose != "precompute":
        yield from _weight_paths(draft)
    if args.resume not in _RESUME_WORDS:
        yield "args.resume", args.resume
    for name in ("input_file", "image"):
        if is_sampling and getattr(args, name) is not None:
            yield f"args.{name}", getattr(args, name)
    if draft.data is not None and draft.data.cache == "require" and draft.purpose == "train":
        return  # neither the text encoder nor the autoencoder need be on this machine
    encoder = draft.model.conditioner_config.params.emb_models[0].params
    yield "model.conditioner_config.params.emb_models.0.params.model_dir", encoder.model_dir
    yield "model.first_stage_config.params.ckpt_path", draft.model.first_stage_config.params.ckpt_path


def _weight_paths(draft: Draft) -> Iterator[tuple[str, str]]:
    """Yields the paths of the transformer's weights; a run that resumes has its adapters already."""
    args = draft.args
    if args.load is not None and (args.load_base is None or draft.purpose == "sample"):
        yield "args.load", args.load
    if args.load_base is not None:
        yield "args.load_base", args.load_base
    if args.load_lora is not None and args.resume == "none":
        yield "args.load_lora", args.load_lora


RULES = (needed_paths_exist,)

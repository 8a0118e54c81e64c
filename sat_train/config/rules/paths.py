"""Rules on files and folders that must be there before anything starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sat_train.config.rules.rule import Draft, rule
from sat_train.errors import Fault

_PLACEHOLDER = re.compile(r"\{.+\}")
_HUB_NAME = re.compile(r"^[\w-]+/[\w.-]+$")
_RESUME_WORDS = ("auto", "must", "none")


def is_placeholder(path: str) -> bool:
    """Tells whether a preset leaves this path to the person, as in `{folder of CogVideoX-5b}/transformer`."""
    return bool(_PLACEHOLDER.search(path))


def placeholders(draft: Draft) -> list[str]:
    """Returns the paths that are still to be filled in, as `key = value`."""
    return [f"{key} = {path}" for key, path in _needed_paths(draft) if is_placeholder(path)]


@rule()
def needed_paths_exist(draft: Draft) -> Iterator[Fault]:
    for key, path in _needed_paths(draft):
        if is_placeholder(path):
            if draft.purpose != "check":
                yield draft.fault(key, path, "a path in place of the part in braces")
        elif not Path(path).exists() and not (key.endswith("model_dir") and _HUB_NAME.match(path)):
            yield draft.fault(key, path, "a file or folder that exists")


def _needed_paths(draft: Draft) -> Iterator[tuple[str, str]]:
    args, is_sampling = draft.args, draft.purpose == "sample"
    if not is_sampling:
        for name in ("train_data", "valid_data"):
            for index, path in enumerate(getattr(args, name) or ()):
                yield f"args.{name}.{index}", path
    if args.load is not None and draft.purpose != "precompute":
        yield "args.load", args.load
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


RULES = (needed_paths_exist,)

"""Rules on files and folders that must exist before anything starts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sat_train.config.paths import exists, is_placeholder
from sat_train.config.rule import ParsedConfig, rule
from sat_train.config.schema.args import IMAGE_SEPARATOR
from sat_train.config.weights_folder import AUTOENCODER, TEXT_ENCODER
from sat_train.errors import Fault
from sat_train.patterns import expand_braces, find_local

_HUB_NAME = re.compile(r"^[\w-]+/[\w.-]+$")
_RESUME_WORDS = ("auto", "must", "none")
# Their names in other trainers.
_RESUME_ALIASES = dict.fromkeys(("latest", "last", "newest", "true", "yes"), "auto")
_RESUME_ALIASES |= dict.fromkeys(("never", "false", "no", "off"), "none")
_DATA = ("args.train_data.", "args.valid_data.")


def placeholders(config: ParsedConfig) -> list[str]:
    """Returns the paths that the user has still to fill in, as `key = value`."""
    return [
        f"{key} = {path}"
        for key, path in _needed_paths(config)
        if is_placeholder(path) and not _follows_from_load(config, key)
    ]


@rule(looks_at_paths=True)
def needed_paths_exist(config: ParsedConfig) -> Iterator[Fault]:
    for key, path in _needed_paths(config):
        if is_placeholder(path):
            if config.purpose != "check" and not _follows_from_load(config, key):
                yield config.fault(key, path, _wanted_in_place_of_braces(config, key))
        elif key.startswith(_DATA):
            absent = _absent(path)
            if absent is not None:
                yield config.fault(key, absent, _wanted_path(key, absent))
        elif not exists(path) and not (key.endswith("model_dir") and _HUB_NAME.match(path)):
            yield config.fault(key, path, _wanted_path(key, path), _RESUME_ALIASES.get(path.lower(), ""))


def _wanted_path(key: str, path: str) -> str:
    expected = "a file or folder that exists"
    if key == "args.resume":
        expected = f"one of {', '.join(_RESUME_WORDS)}, or a run directory that exists"
    return f"{expected}; folders are separated by `/` here" if "\\" in path else expected


def _follows_from_load(config: ParsedConfig, key: str) -> bool:
    """Returns whether a folder for `args.load`, which is missing too, is all that this key needs."""
    load_is_missing = config.args.load is not None and is_placeholder(config.args.load)
    return key in (TEXT_ENCODER, AUTOENCODER) and load_is_missing and config.purpose != "precompute"


def _wanted_in_place_of_braces(config: ParsedConfig, key: str) -> str:
    if key == "args.load":
        return "the diffusers folder of these weights: text encoder and autoencoder are taken from it too"
    if key in (TEXT_ENCODER, AUTOENCODER):
        return f"a path in place of the braces, since args.load = {config.args.load} is no diffusers folder"
    return "a path in place of the part in braces"


def _absent(entry: str) -> str | None:
    """Returns the first file that an entry of the training data names and that does not exist.

    Remote files are not checked until they are read: a configuration is checked without a network.
    """
    if "://" in entry or exists(entry):
        return None
    return next((name for name in expand_braces(entry) if not _is_found(name)), None)


def _is_found(pattern: str) -> bool:
    try:
        return bool(find_local(pattern))
    except (OSError, ValueError, re.error):  # no name that a file can have
        return False


def _needed_paths(config: ParsedConfig) -> Iterator[tuple[str, str]]:
    args, is_sampling = config.args, config.purpose == "sample"
    if not is_sampling:
        for name in ("train_data", "valid_data"):
            for index, path in enumerate(getattr(args, name) or ()):
                yield f"args.{name}.{index}", path
    if config.purpose != "precompute":
        yield from _weight_paths(config)
    if args.resume not in _RESUME_WORDS:
        yield "args.resume", args.resume
    if config.purpose in ("train", "check"):
        for index, image in enumerate(args.valid_images):
            yield f"args.valid_images.{index}", image
        for index, prompt in enumerate(args.valid_prompts):
            if image := prompt.partition(IMAGE_SEPARATOR)[2].strip():
                yield f"args.valid_prompts.{index}", image
    for name in ("input_file", "image"):
        if is_sampling and getattr(args, name) is not None:
            yield f"args.{name}", getattr(args, name)
    if config.data is not None and config.data.cache == "require" and config.purpose == "train":
        return  # neither the text encoder nor the autoencoder need be on this machine
    yield TEXT_ENCODER, config.spec.text.model_dir
    yield AUTOENCODER, config.spec.vae.ckpt_path


def _weight_paths(config: ParsedConfig) -> Iterator[tuple[str, str]]:
    """Yields the paths of the transformer's weights; a run that resumes has its adapters already."""
    args = config.args
    if args.load is not None and (args.load_base is None or config.purpose == "sample"):
        yield "args.load", args.load
    if args.load_base is not None:
        yield "args.load_base", args.load_base
    if args.resume == "none":
        yield from (("args.load_lora", path) for path in args.load_lora or ())
        yield from (("args.load_modules", path) for path in args.load_modules or ())

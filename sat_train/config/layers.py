"""YAML files and the command line as layers, merged in order, each value remembering where it came from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml.error import YAMLError

from sat_train.config.catalog import pattern_of, slot_targets
from sat_train.config.legacy import modernize
from sat_train.config.paths import PACKAGE, find_config
from sat_train.config.words import COMMAND_LINE, read_words
from sat_train.errors import Fault

DEFAULT = "default"
EMBEDDED = "configs/model/cogvideox_tiny.yaml"
# `${a.b}` refers to another key. Other resolvers could read the environment into a saved file.
_REFERENCE = "a reference `${section.key}` to a key that exists; resolvers such as `oc.env` are refused"
_RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")


@dataclass(frozen=True)
class Layer:
    """One file, or the command line, in today's names.

    Args:
        name: File as a person would type it, or `command line`.
        tree: Its content without the `base` key.
        dropped: Keys of older files that have no effect, with the reason.
        is_embedded: Nobody named this file; it stands in for a model that no file chooses.
    """

    name: str
    tree: dict[str, Any]
    dropped: dict[str, str]
    is_embedded: bool = False


@dataclass
class Merged:
    """The layers on top of each other.

    Args:
        tree: One value for each key.
        sources: The layer each leaf came from, by dotted path.
        derived: Keys whose value was taken from another spelling of the same setting.
        order: The layers, first to last; of two spellings the one in the later layer wins.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    derived: set[str] = field(default_factory=set)
    order: list[str] = field(default_factory=list)

    def source_of(self, path: str) -> str:
        """Returns the layer of a key, or of the nearest group above it; empty for a default."""
        while path and path not in self.sources:
            path = path.rpartition(".")[0]
        return self.sources.get(path, "")

    def rank_of(self, path: str) -> int:
        """Returns the place of a key's layer among all layers; -1 for a default."""
        source = self.source_of(path)
        return self.order.index(source) if source in self.order else -1


def read_layers(base: Sequence[str | Path], words: Sequence[str], faults: list[Fault]) -> list[Layer]:
    """Reads all files, those named under their `base` first, and the command line last.

    Args:
        base: Files in order. The embedded tiny model comes first when none of them chooses a network.
        words: What else stands on the command line.
        faults: Gets what cannot be read.
    """
    seen: set[Path] = set()
    layers = [layer for path in base for layer in _read_file(path, Path(path), seen, faults)]
    content, dropped = modernize(read_words(words, faults))
    layers.append(Layer(COMMAND_LINE, content, dropped))
    if not any(_chooses_network(layer.tree) for layer in layers):
        embedded = _read_file(EMBEDDED, PACKAGE / EMBEDDED, seen, faults)
        layers[:0] = [replace(layer, is_embedded=True) for layer in embedded]
    return layers


def merge_layers(layers: Sequence[Layer]) -> Merged:
    """Merges layers in order; later wins. Groups are merged key by key, lists are replaced whole."""
    merged = Merged(order=list(dict.fromkeys(layer.name for layer in layers)))
    for layer in layers:
        _merge(merged.tree, layer.tree, "", layer.name, merged.sources)
    return merged


def resolve_references(merged: Merged, faults: list[Fault]) -> None:
    """Replaces `${a.b}` in the merged tree by what the key `a.b` holds.

    Args:
        merged: Changed in place.
        faults: Gets references to nothing, and resolvers, which are refused.
    """
    references = [(path, text) for path, text in _texts(merged.tree, "") if "${" in text]
    for path, text in references:
        if not _is_plain_reference(text):
            _replace(merged.tree, path.split("."), None)  # it must not keep the others from being read
            faults.append(Fault(path, text, _REFERENCE, merged.source_of(path)))
    config = OmegaConf.create(merged.tree if references else {})
    for path, text in references:
        if not _is_plain_reference(text):
            continue
        try:
            value = OmegaConf.select(config, path, throw_on_missing=True)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            faults.append(Fault(path, text, _REFERENCE, merged.source_of(path)))
        else:
            _replace(merged.tree, path.split("."), value)


def _is_plain_reference(text: str) -> bool:
    try:
        OmegaConf.create({"text": text})
    except OmegaConfBaseException:
        return False
    return not _RESOLVER.search(text)


def _read_file(
    typed: str | Path, path: Path, seen: set[Path], faults: list[Fault], by: str = ""
) -> list[Layer]:
    found = find_config(path)
    if found is None:
        faults.append(
            Fault("base" if by else "--base", str(typed), "a YAML file that exists", by or COMMAND_LINE)
        )
        return []
    if found.resolve() in seen:
        return []
    seen.add(found.resolve())
    name = _display(found)
    content = _parse(found, name, faults)
    if content is None:
        return []
    included = content.pop("base", [])
    included = [included] if isinstance(included, str) else included
    if not isinstance(included, list) or not all(isinstance(item, str) for item in included):
        faults.append(Fault("base", str(included), "a list of YAML files, relative to this one", name))
        included = []
    layers = [
        layer for item in included for layer in _read_file(item, found.parent / item, seen, faults, by=name)
    ]
    tree, dropped = modernize(content)
    return [*layers, Layer(name, tree, dropped)]


def _parse(path: Path, name: str, faults: list[Fault]) -> dict[str, Any] | None:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        faults.append(Fault(name, "", f"readable YAML, but: {reason}"))
        return None
    if not isinstance(content, dict):
        faults.append(Fault(name, "", "sections such as `args:` and `model:`"))
        return None
    return {str(key): value for key, value in content.items()}


def _display(path: Path) -> str:
    """Returns the path as short as it can be typed: within the package, within this folder, or whole."""
    path = Path(os.path.normpath(path))
    for folder in (PACKAGE.parent, PACKAGE):
        if path.is_relative_to(folder / "configs"):
            return str(path.relative_to(folder))
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _chooses_network(tree: dict[str, Any]) -> bool:
    model = tree.get("model")
    network = model.get("network_config") if isinstance(model, dict) else None
    return isinstance(network, dict) and "target" in network


def _merge(
    into: dict[str, Any], layer: dict[str, Any], path: str, name: str, sources: dict[str, str]
) -> None:
    _drop_params_of_other_target(into, layer, path, sources)
    for key, value in layer.items():
        inner = f"{path}.{key}" if path else str(key)
        here = into.get(key)
        if isinstance(value, dict) and isinstance(here, list) and _are_places(value, here):
            _merge_into_list(here, value, inner, name, sources)
        elif isinstance(value, dict):
            if not isinstance(here, dict):
                _forget(sources, inner)
                into[key] = {}
                sources[inner] = name
            _merge(into[key], value, inner, name, sources)
        else:
            _forget(sources, inner)
            into[key] = value
            sources[inner] = name


def _merge_into_list(
    here: list[Any], layer: dict[str, Any], path: str, name: str, sources: dict[str, str]
) -> None:
    for place, value in ((int(key), value) for key, value in layer.items()):
        if isinstance(value, dict) and isinstance(here[place], dict):
            _merge(here[place], value, f"{path}.{place}", name, sources)
        else:
            here[place] = value
            sources[f"{path}.{place}"] = name


def _are_places(layer: dict[str, Any], here: list[Any]) -> bool:
    """Tells whether all keys of a group are places in a list, which is how the command line names them."""
    return all(str(key).isdigit() and int(key) < len(here) for key in layer)


def _drop_params_of_other_target(
    into: dict[str, Any], layer: dict[str, Any], path: str, sources: dict[str, str]
) -> None:
    """Where a layer chooses another target, keeps only those earlier params that it knows too."""
    params, target = into.get("params"), layer.get("target")
    record = slot_targets().get(pattern_of(path), {}).get(str(target))
    if not isinstance(params, dict) or record is None or target == into.get("target"):
        return
    for key in [key for key in params if key not in record.model_fields]:
        del params[key]
        _forget(sources, f"{path}.params.{key}")


def _forget(sources: dict[str, str], path: str) -> None:
    for known in [known for known in sources if known == path or known.startswith(f"{path}.")]:
        del sources[known]


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _texts(item, f"{path}.{key}" if path else str(key))


def _replace(tree: Any, parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    tree[int(parts[-1]) if isinstance(tree, list) else parts[-1]] = value

"""YAML files and the command line as layers, merged in order, with the source of each value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sat_train.config.catalog import all_keys, is_place, pattern_of, slot_targets
from sat_train.config.extensions import KEY
from sat_train.config.legacy import modernize
from sat_train.config.paths import PACKAGE
from sat_train.config.reading import FileReader
from sat_train.config.values import unusable
from sat_train.config.words import COMMAND_LINE, WANTED_BASE, read_words
from sat_train.errors import Fault

DEFAULT = "default"
EMBEDDED = "configs/model/cogvideox_tiny.yaml"


@dataclass(frozen=True)
class Layer:
    """One file, or the command line, in today's names.

    Args:
        name: File as the user would type it, or `command line`.
        tree: Its content without the `base` key.
        dropped: Keys of older files that have no effect, with the reason.
        is_embedded: Not named by the user; it stands in for a model that no file chooses.
        is_unread: It could not be read, so its content is unknown.
        extensions: A run's record of the extensions that it was trained with; None where there were none.
    """

    name: str
    tree: dict[str, Any]
    dropped: dict[str, str]
    is_embedded: bool = False
    is_unread: bool = False
    extensions: Any = None


@dataclass
class Merged:
    """The merged layers.

    Args:
        tree: One value for each key.
        sources: The layer each leaf came from, by dotted path.
        derived: Keys whose value comes from another spelling of the same setting.
        order: The layers, first to last; of two spellings the one in the later layer wins.
        translated: Keys of SAT forks that are understood, with the keys that they have become.
    """

    tree: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    derived: set[str] = field(default_factory=set)
    order: list[str] = field(default_factory=list)
    translated: dict[str, str] = field(default_factory=dict)

    def source_of(self, path: str) -> str:
        """Returns the layer of a key, or of the nearest group above it; empty for a default."""
        while path and path not in self.sources:
            path = path.rpartition(".")[0]
        return self.sources.get(path, "")

    def rank_of(self, path: str) -> int:
        """Returns the index of a key's layer among all layers; -1 for a default."""
        source = self.source_of(path)
        return self.order.index(source) if source in self.order else -1


def read_layers(base: Sequence[str | Path], words: Sequence[str], faults: list[Fault]) -> list[Layer]:
    """Reads all files, those named under their `base` first, and the command line last.

    Args:
        base: Files in order. The embedded tiny model comes first when none of them chooses a network.
        words: The rest of the command line.
        faults: Receives what cannot be read.
    """
    reader = FileReader(faults)
    layers = [_layer(*file, faults) for path in base for file in reader.read(path)]
    for tree in read_words(words, faults):
        layers.append(_layer(COMMAND_LINE, tree, faults))
    if any(fault.expected == WANTED_BASE for fault in faults):
        layers.append(Layer(COMMAND_LINE, {}, {}, is_unread=True))
    if not any(_chooses_network(layer.tree) for layer in layers):
        embedded = reader.read(PACKAGE / EMBEDDED)
        layers[:0] = [replace(_layer(*file, faults), is_embedded=True) for file in embedded]
    return layers


def read_layer(path: Path, faults: list[Fault]) -> Layer:
    """Reads one file alone: no other file that it may name, no command line."""
    (file,) = FileReader(faults, follows_base=False).read(path)
    return _layer(*file, faults)


def _layer(name: str, content: dict[str, Any] | None, faults: list[Fault]) -> Layer:
    if content is None:
        return Layer(name, {}, {}, is_unread=True)
    for path, value, expected in list(unusable(content)):
        replace_value(content, path.split("."), None)  # it must not keep the others from being read
        faults.append(Fault(path, value, expected, name))
    extensions = content.pop(KEY, None)
    tree, dropped = modernize(content)
    return Layer(name, tree, dropped, extensions=extensions)


def merge_layers(layers: Sequence[Layer]) -> Merged:
    """Merges layers in order; later wins. Groups are merged key by key, lists are replaced whole."""
    merged = Merged(order=list(dict.fromkeys(layer.name for layer in layers)))
    for layer in layers:
        _merge(merged.tree, layer.tree, "", layer.name, merged.sources)
    return merged


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
        if value is None and _goes_back_to_default(inner):
            forget_sources(sources, inner)
            into.pop(key, None)
        elif isinstance(value, dict) and isinstance(here, list) and _are_places(value, here):
            _merge_into_list(here, value, inner, name, sources)
        elif isinstance(value, dict):
            if not isinstance(here, dict):
                _forget_replaced(sources, inner, here)
                into[key] = {}
                sources[inner] = name
            _merge(into[key], value, inner, name, sources)
        else:
            _forget_replaced(sources, inner, here)
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
    """Returns whether all keys of a group are indices of a list, which is how the command line names them."""
    return bool(layer) and all(is_place(key) and int(key) < len(here) for key in layer)


def _goes_back_to_default(path: str) -> bool:
    """Returns whether null removes a whole section that cannot hold null itself."""
    key = all_keys().get(pattern_of(path))
    return key is not None and key.is_section and not key.is_nullable


def _drop_params_of_other_target(
    into: dict[str, Any], layer: dict[str, Any], path: str, sources: dict[str, str]
) -> None:
    """Keeps, where a layer chooses another target, only those earlier params that the new target has too.

    A key of the same name and another type, such as CAME's three betas, is another setting.
    """
    table = slot_targets().get(pattern_of(path))
    if table is None:
        return
    params, key = into.get("params") if table.place else into, table.key
    record = table.params.get(str(layer.get(key)))
    if not isinstance(params, dict) or record is None or layer[key] == into.get(key):
        return
    fields, old = record.model_fields, table.params.get(str(into.get(key)), record).model_fields
    kept = {
        name for name, each in fields.items() if name not in old or old[name].annotation == each.annotation
    }
    for name in params.keys() - kept - ({key} if params is into else set()):
        del params[name]
        forget_sources(sources, f"{path}.{table.place}{name}")


def _forget_replaced(sources: dict[str, str], path: str, value: Any) -> None:
    if isinstance(value, dict | list):
        forget_sources(sources, path)
    else:  # no key is below it
        sources.pop(path, None)


def forget_sources(sources: dict[str, str], path: str) -> None:
    """Drops the sources of a key and of all keys below it."""
    for known in [known for known in sources if known == path or known.startswith(f"{path}.")]:
        del sources[known]


def replace_value(tree: Any, parts: Sequence[str], value: Any) -> None:
    """Writes a value where the tree has one already; `parts` are the keys and indices on the way to it."""
    for part in parts[:-1]:
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    tree[int(parts[-1]) if isinstance(tree, list) else parts[-1]] = value

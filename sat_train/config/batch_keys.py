"""`batch2model_keys` of SAT: names of values of a batch that the loss hands to the network and its mixins.

Each becomes a named tensor of the same name, `context.extras[NAME]` in a hook, by a condition of that name.
Where there is none the field of that name gets one: `FieldValues` hands numbers on as they are, and
`ControlVideo` the latent of a video.

Source: zai-org/CogVideo@7a1af71 `sat/sgm/modules/diffusionmodules/loss.py`; keys that a batch does not hold
are passed over there in silence.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticUndefined

from sat_train.config.aliases import get_value, remove_value
from sat_train.config.layers import Merged
from sat_train.config.values import show_value
from sat_train.errors import Fault

_PATHS = tuple(f"model.loss_fn_config.params.{key}" for key in ("batch2model_keys", "batch2model_input"))
_CONDITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "per_frame": ("FieldValues", {}),
    "array": ("FieldValues", {}),
    "video": ("ControlVideo", {"into": "extras"}),
}
_WANTED = (
    "names of values that modules read, each a condition of model.conditions, or a field of data.fields with "
    f"kind {', '.join(_CONDITIONS)}"
)


def translate_batch_keys(merged: Merged, faults: list[Fault]) -> None:
    """Turns the key, where it is set, into `model.conditions`.

    Args:
        merged: Changed in place, before it is validated.
        faults: Receives names that are neither a condition nor a field.
    """
    for path in _PATHS:
        value = get_value(merged.tree, path)
        if value is PydanticUndefined:
            continue
        source = merged.source_of(path)
        remove_value(merged, path)
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            faults.append(Fault(path, show_value(value), _WANTED, source))
            continue
        for name in names:
            if not _has_condition(merged, name, source):
                faults.append(Fault(path, name, f"{_WANTED} (docs/extend.md)", source))
        if names:
            merged.translated[path] = ", ".join(f"model.conditions.{name}" for name in names)


def _has_condition(merged: Merged, name: str, source: str) -> bool:
    """Returns whether there is a condition of this name, or a field of which one has been made."""
    model, fields = merged.tree["model"], get_value(merged.tree, "data.fields")
    conditions = model.setdefault("conditions", {})
    if not isinstance(conditions, dict):
        return True  # a fault of its own, which `validate` names
    field = fields.get(name) if isinstance(fields, dict) else None
    kind = field.get("kind") if isinstance(field, dict) else None
    if name not in conditions and isinstance(kind, str) and kind in _CONDITIONS:
        target, params = _CONDITIONS[kind]
        conditions[name] = {"target": target, "params": {"field": name, **params}}
        merged.sources[f"model.conditions.{name}"] = source
    return name in conditions

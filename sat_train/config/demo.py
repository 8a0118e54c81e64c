"""The demo clips, captions and prompts serve the embedded tiny model, never a run on the user's own data."""

from __future__ import annotations

from sat_train.config.layers import EMBEDDED, Merged

_TRAIN_DATA = "train_data"
_GOES_WITH_IT = ("valid_data", "valid_prompts", "valid_images")


def drop_demo(merged: Merged) -> None:
    """Drops the demo's validation clips and prompts once the user has named other training data.

    Args:
        merged: Changed in place, before it is validated.
    """
    args = merged.tree.get("args")
    if not isinstance(args, dict) or merged.source_of(f"args.{_TRAIN_DATA}") == EMBEDDED:
        return
    for key in _GOES_WITH_IT:
        if merged.sources.get(f"args.{key}") == EMBEDDED:
            del args[key], merged.sources[f"args.{key}"]

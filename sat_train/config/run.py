"""The validated configuration of one run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import Field

from sat_train.config.extensions import KEY, Extensions
from sat_train.config.model_spec import ModelSpec, build_model_spec
from sat_train.config.parts.record import Record
from sat_train.config.paths import shorten_assets
from sat_train.config.schema.args import ArgsConfig
from sat_train.config.schema.data_section import DataConfig
from sat_train.config.schema.deepspeed import DeepSpeedConfig
from sat_train.config.schema.model_section import ModelConfig
from sat_train.config.values import map_texts
from sat_train.errors import without_secrets

# Settings of storage and display, which do not change the numbers of a run.
_WITHOUT_EFFECT_ON_NUMBERS = frozenset(
    [
        "experiment_name",
        "save",
        "save_interval",
        "keep_last",
        "keep_every",
        "log_interval",
        "tensorboard",
        "wandb",
        "silence",
        "wandb_project_name",
        "resume",
        "load_base",
        "num_workers",
        "prefetch_factor",
        "distributed_timeout_minutes",
        "output_dir",
        "valid_prompts",
        "valid_images",
        "valid_video_interval",
    ]
)

_NO_EXTENSIONS = Extensions()
_FPS_WITHOUT_DATA = 8.0  # of the first CogVideoX
_SPLIT_WITH_VALIDATION = "95,5,0"


class Sections(Record):
    """The four sections of the merged files."""

    args: ArgsConfig = Field(ArgsConfig(), description="Training, checkpoints, validation and sampling.")
    model: ModelConfig = Field(description="The model, in CogVideo's shape.")
    data: DataConfig | None = Field(None, description="Training data; sampling needs none.")
    deepspeed: DeepSpeedConfig = Field(DeepSpeedConfig(), description="The DeepSpeed engine.")


@dataclass(frozen=True)
class SectionRecords:
    """The sections of a configuration, each valid by itself.

    Args:
        args: SAT's arguments and ours.
        model: The model.
        data: The data; None only where a run was loaded for sampling.
        deepspeed: The engine.
    """

    args: ArgsConfig
    model: ModelConfig
    data: DataConfig | None
    deepspeed: DeepSpeedConfig

    @cached_property
    def spec(self) -> ModelSpec:
        """Flat record of the model's numbers."""
        return build_model_spec(self.model)

    @property
    def freezes_base(self) -> bool:
        """Returns whether the base stays as it was loaded, but for what `model.train` names.

        Checkpoints then leave it out. So it is with adapters, where all prefixes are frozen, and where there
        are network modules and nothing says what trains.
        """
        return self.spec.adapter is not None or self.model.freezes_base


@dataclass(frozen=True)
class RunConfig(SectionRecords):
    """The complete configuration of a run.

    Args:
        sources: For each dotted key with a value, the file it came from, `command line` or `default`.
        notes: Messages shown to the user once, e.g. old keys without effect.
        needs: Keys still missing before this configuration can be used; empty when it is complete.
        extensions: The extensions that were loaded for it.
    """

    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()
    needs: str = ""
    extensions: Extensions = _NO_EXTENSIONS

    def require_data(self) -> DataConfig:
        """Returns `data` for commands that always have it: training, caching, inspecting data."""
        assert self.data is not None, "this configuration was loaded for sampling, without a data section"
        return self.data

    def shown_tree(self) -> dict[str, Any]:
        """Returns `tree` without passwords and signatures in URLs, for display, trackers and checkpoints."""
        tree: dict[str, Any] = map_texts(self.tree(), without_secrets)
        return tree

    def tree(self) -> dict[str, Any]:
        """Returns the four sections as plain dictionaries, lists and scalars; shipped files as `asset:`.

        With extensions, the record of them is included.
        """
        records = {name: getattr(self, name) for name in Sections.model_fields}
        sections = {
            name: record.model_dump(mode="json") for name, record in records.items() if record is not None
        }
        shortened: dict[str, Any] = shorten_assets(sections)
        return {**shortened, KEY: self.extensions.tree()} if self.extensions.loaded else shortened

    @property
    def sampling_fps(self) -> float:
        """Frames per second of written videos: `args.sampling_fps`, else the rate the model is trained at."""
        trained = self.data.params.fps if self.data is not None else _FPS_WITHOUT_DATA
        return self.args.sampling_fps or trained

    def data_shares(self) -> tuple[float, ...]:
        """Returns the shares of `args.train_data` for training, validation and test: `args.split`."""
        split = self.args.split or (_SPLIT_WITH_VALIDATION if self.args.eval_interval else "1,0,0")
        return tuple(float(share) for share in split.split(","))

    def digest(self) -> str:
        """Returns the sha256, in hex, of every value that can change the numbers of a run."""
        tree = self.shown_tree()  # the same data under another signature is the same data
        tree["args"] = {k: v for k, v in tree["args"].items() if k not in _WITHOUT_EFFECT_ON_NUMBERS}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

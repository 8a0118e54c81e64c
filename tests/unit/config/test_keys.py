"""No key that nobody reads, and builders that know the records they are given."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from sat_train.config.aliases import SAME
from sat_train.config.catalog import Key, all_keys
from sat_train.config.parts.noise_schedule import ZeroSNRDDPMDiscretizationParams
from sat_train.config.parts.record import Record
from sat_train.config.schema.encoder_slots import VideoCoderParams
from sat_train.diffusion.schedule import zero_snr_alpha_bar
from sat_train.models.vae.video_vae import VideoVAE

PACKAGE = Path(__file__).resolve().parents[3] / "sat_train"
# These groups are handed to DeepSpeed whole.
HANDED_ON = ("deepspeed.zero_optimization.", "deepspeed.fp16.", "deepspeed.bf16.")


def readers() -> str:
    """Returns all code that may read a setting: not where settings are only declared or translated."""
    declared = {PACKAGE / "config/schema", PACKAGE / "config/legacy.py"}
    files = [path for path in PACKAGE.rglob("*.py") if not declared & {path, *path.parents}]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def is_choice_of_one(key: Key) -> bool:
    return key.expected.count(",") == 0 and key.expected == str(key.default)


def test_every_key_is_read() -> None:
    code = readers()
    read = set(re.findall(r"[.\"']([a-z_0-9]+)\b", code))
    unread = [
        key.path
        for key in all_keys().values()
        if not key.is_section
        and not key.path.startswith(HANDED_ON)
        and not key.path.endswith(".target")
        and not is_choice_of_one(key)
        and key.path.rpartition(".")[2] not in read
        and SAME.get(key.path, "").rpartition(".")[2] not in read
    ]
    assert not unread


# A record, what is built from it, and the words that the two sides spell differently.
BUILT: list[tuple[type[Record], object, dict[str, str]]] = [
    (
        VideoCoderParams,
        VideoVAE.__init__,
        {},
    ),
    (
        ZeroSNRDDPMDiscretizationParams,
        zero_snr_alpha_bar,
        {"linear_start": "beta_start", "linear_end": "beta_end"},
    ),
]


@pytest.mark.parametrize(
    ("record", "builder", "renamed"), BUILT, ids=lambda part: getattr(part, "__name__", "")
)
def test_what_is_built_knows_each_setting(
    record: type[Record], builder: object, renamed: dict[str, str]
) -> None:
    known = inspect.signature(builder).parameters.keys()
    assert {renamed.get(name, name) for name in record.model_fields} <= known

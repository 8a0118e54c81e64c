"""Settings of a resumed run: those that may not change, and those that its version did not have."""

from __future__ import annotations

import pytest

from sat_train.config import RunConfig, load_run_config
from sat_train.errors import ConfigError
from sat_train.training.resume import check_config_unchanged


def read(*words: str) -> RunConfig:
    return load_run_config(["configs/lora.yaml"], words, purpose="check", check_paths=False)


def test_a_key_that_did_not_exist_is_unchanged_at_its_default_alone() -> None:
    saved = read().shown_tree()
    for key in ("quantize_base", "block_swap", "checkpoint_offload"):
        del saved["args"][key]
    del saved["model"]["first_stage_config"]["params"]["tile_samples"]
    check_config_unchanged(saved, read("args.block_swap=0"))
    check_config_unchanged(saved, read("model.first_stage_config.params.tile_samples=false"))
    with pytest.raises(ConfigError, match=r"args\.quantize_base = nf4"):
        check_config_unchanged(saved, read("args.quantize_base=nf4"))

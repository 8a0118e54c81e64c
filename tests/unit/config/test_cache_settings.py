"""Settings of the cache that cannot work are refused, and `off` is a word."""

from __future__ import annotations

import pytest

from sat_train.config import load_run_config
from sat_train.errors import ConfigError

WORDS = ["args.train_data=[x]", "args.train_iters=1", "args.mode=pretrain", "args.load=null"]


@pytest.mark.parametrize("mode", ["read", "require", "fill"])
def test_a_cache_has_a_folder(mode: str) -> None:
    with pytest.raises(
        ConfigError, match=f"data.cache_dir = null: expected a folder, because data.cache is {mode}"
    ):
        load_run_config([], [*WORDS, f"data.cache={mode}"], check_paths=False)


def test_precompute_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"cache_dir = null: expected a folder for the encoded samples"):
        load_run_config([], WORDS, purpose="precompute", check_paths=False)


def test_off_without_quotes_is_off() -> None:
    config = load_run_config([], [*WORDS, "data.cache=off", "args.compile=off"], check_paths=False)
    assert (config.data.cache, config.args.compile) == ("off", "off")
    assert config.data.params.views is None


def test_with_require_the_encoders_need_not_be_there() -> None:
    missing = "model.first_stage_config.params.ckpt_path=/nowhere/vae.pt"
    cached = [missing, "data.cache_dir=/cache"]
    with pytest.raises(ConfigError) as without:
        load_run_config([], [*WORDS, missing])
    with pytest.raises(ConfigError) as with_cache:
        load_run_config([], [*WORDS, *cached, "data.cache=require"])
    assert "/nowhere/vae.pt" in str(without.value)
    assert "/nowhere/vae.pt" not in str(with_cache.value)

"""Which shapes a configuration allows."""

from __future__ import annotations

import pytest

from sat_train.config import load_run_config
from sat_train.config.shapes import allowed_frames, allowed_sizes
from sat_train.errors import ConfigError


def load(*words: str, model: str = "cogvideox_5b"):
    return load_run_config(
        [f"configs/model/{model}.yaml", "configs/sft.yaml"], list(words), purpose="check", check_paths=False
    )


def sizes(*words: str, model: str = "cogvideox_5b"):
    config = load(*words, model=model)
    return allowed_sizes(config.data.params, config.spec)


def test_sizes_are_video_size_and_those_given_each_once() -> None:
    words = ["data.params.buckets.sizes=[[480,720],[720,480]]", "data.params.buckets.aspects=['3:2','1:1']"]
    assert sizes(*words) == ((480, 720), (720, 480), (576, 576))
    assert sizes() == ((480, 720),)


def test_an_aspect_without_quotes_is_read_as_it_is_written(tmp_path) -> None:
    """YAML takes `16:9` for a number to base 60."""
    path = tmp_path / "a.yaml"
    path.write_text("data: {params: {buckets: {aspects: [16:9, 9:16, 1:1, 4:3, 21:9]}}}")
    config = load_run_config(
        ["configs/model/cogvideox_5b.yaml", "configs/sft.yaml", path],
        [],
        purpose="check",
        check_paths=False,
    )
    assert config.data.params.buckets.aspects == ("16:9", "9:16", "1:1", "4:3", "21:9")


def test_lengths_are_falling() -> None:
    config = load("data.params.buckets.frames=[1,33,17]")
    assert allowed_frames(config.data.params, config.spec) == (49, 33, 17, 1)


@pytest.mark.parametrize("model", ["cogvideox_2b", "cogvideox_5b_i2v"])
def test_models_with_tables_of_positions_say_that_they_cannot_vary_size(model: str) -> None:
    with pytest.raises(ConfigError, match=r"buckets = .*1:1.*no other size: this model's positions"):
        load("data.params.buckets.aspects=['1:1']", model=model)
    assert len(sizes("data.params.buckets.frames=[17]", model=model)) == 1
    table = "model.network_config.params.modules.pos_embed_config.params.size_policy=interpolate"
    assert len(sizes("data.params.buckets.aspects=['1:1']", table, model=model)) == 2

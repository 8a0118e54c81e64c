"""A first run on a real model needs one folder of weights, own clips, and nothing of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from sat_train.config import RunConfig, load_run_config
from sat_train.config.resolved import render_resolved
from sat_train.errors import ConfigError

MODELS = sorted(Path("configs/model").glob("cogvideox*.yaml"))
REAL_MODELS = [path for path in MODELS if "tiny" not in path.stem]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder laid out as diffusers lays out a model."""
    folder = tmp_path / "CogVideoX"
    for part in ("transformer", "vae", "text_encoder", "tokenizer"):
        (folder / part).mkdir(parents=True)
    return folder


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    return folder


def encoders(config: RunConfig) -> tuple[str, str]:
    return (
        config.model.conditioner_config.params.emb_models[0].params.model_dir,
        config.model.first_stage_config.params.ckpt_path,
    )


@pytest.mark.parametrize("model", REAL_MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", ["configs/sft.yaml", "configs/lora.yaml"])
@pytest.mark.parametrize("part", ["", "transformer"], ids=["whole folder", "transformer"])
def test_one_folder_of_weights_gives_text_encoder_and_autoencoder(
    model: Path, preset: str, part: str, weights: Path, clips: Path
) -> None:
    words = [f"args.load={weights / part}", f"args.train_data=[{clips}]"]
    for purpose in ("train", "precompute"):
        config = load_run_config([model, preset], [*words, "data.cache_dir=cache"], purpose=purpose)  # type: ignore[arg-type]
        assert encoders(config) == (str(weights), str(weights / "vae"))
        assert "found next to args.load" in render_resolved(config)


@pytest.mark.parametrize("model", REAL_MODELS, ids=lambda path: path.stem)
def test_sampling_takes_the_same_folder(model: Path, weights: Path, tmp_path: Path) -> None:
    image = tmp_path / "first.png"
    image.touch()
    words = [f"args.load={weights}", "--prompt", "a cat", f"args.image={image}"]
    words = words if "i2v" in model.stem else words[:-1]
    config = load_run_config([model, "configs/sample.yaml"], words, purpose="sample")
    assert encoders(config) == (str(weights), str(weights / "vae"))


def test_a_path_that_was_given_is_kept(weights: Path, clips: Path, tmp_path: Path) -> None:
    other = tmp_path / "other_vae"
    other.mkdir()
    words = [f"args.load={weights}", f"args.train_data=[{clips}]"]
    own = f"model.first_stage_config.params.ckpt_path={other}"
    config = load_run_config(["configs/model/cogvideox_5b.yaml", "configs/lora.yaml"], [*words, own])
    assert encoders(config) == (str(weights), str(other))


def test_a_folder_that_lacks_a_part_says_which(weights: Path, clips: Path) -> None:
    (weights / "vae").rmdir()
    words = [f"args.load={weights}", f"args.train_data=[{clips}]"]
    with pytest.raises(
        ConfigError, match=r"ckpt_path = .*/vae: expected a file or folder that exists.*args\.load"
    ):
        load_run_config(["configs/model/cogvideox_5b.yaml", "configs/lora.yaml"], words)


def test_weights_that_are_no_diffusers_folder_need_the_two_paths(tmp_path: Path, clips: Path) -> None:
    file = tmp_path / "mp_rank_00_model_states.pt"
    file.touch()
    words = [f"args.load={file}", f"args.train_data=[{clips}]"]
    with pytest.raises(ConfigError, match="no diffusers folder") as caught:
        load_run_config(["configs/model/cogvideox_5b.yaml", "configs/lora.yaml"], words)
    assert len(caught.value.faults) == 2


def test_a_missing_folder_is_one_fault_not_three(clips: Path) -> None:
    words = [f"args.train_data=[{clips}]"]
    with pytest.raises(ConfigError) as caught:
        load_run_config(["configs/model/cogvideox_5b.yaml", "configs/lora.yaml"], words)
    assert [fault.path for fault in caught.value.faults] == ["args.load"]


def test_training_on_from_a_run_takes_the_encoders_of_that_run(
    weights: Path, clips: Path, tmp_path: Path
) -> None:
    files = ["configs/model/cogvideox_5b.yaml", "configs/sft.yaml"]
    data = f"args.train_data=[{clips}]"
    earlier = load_run_config(files, [f"args.load={weights}", data])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "resolved.yaml").write_text(render_resolved(earlier), encoding="utf-8")
    assert encoders(load_run_config(files, [f"args.load={folder}", data])) == encoders(earlier)


def demo_paths(config: RunConfig) -> list[str]:
    paths = [*(config.args.train_data or ()), *(config.args.valid_data or ())]
    return [path for path in paths if "/demo/" in path]


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", ["configs/sft.yaml", "configs/lora.yaml"])
def test_a_run_on_own_data_has_nothing_of_the_demo(model: Path, preset: str) -> None:
    config = load_run_config([model, preset], ["args.train_data=[my_clips]"], check_paths=False)
    assert not demo_paths(config)
    assert config.args.valid_data is None
    assert config.args.valid_prompts == ()
    assert config.data_shares()[1] > 0


def test_the_embedded_model_without_other_data_runs_the_demo() -> None:
    config = load_run_config(["configs/sft.yaml"])
    assert len(demo_paths(config)) == 2
    assert config.args.valid_prompts


@pytest.mark.parametrize("key", ["valid_data=[mine]", "valid_prompts=[mine]"])
def test_own_validation_is_kept_with_own_data(key: str) -> None:
    words = ["args.train_data=[my_clips]", f"args.{key}"]
    config = load_run_config(["configs/sft.yaml"], words, check_paths=False)
    assert getattr(config.args, key.partition("=")[0]) == ("mine",)
    assert not demo_paths(config)


@pytest.mark.parametrize("model", REAL_MODELS, ids=lambda path: path.stem)
def test_a_real_model_never_trains_on_the_demo_by_itself(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"args\.train_data"):
        load_run_config([model, "configs/sft.yaml"], check_paths=False)


def test_without_validation_all_clips_train() -> None:
    words = ["args.train_data=[my_clips]", "args.eval_interval=null", "args.valid_video_interval=null"]
    config = load_run_config(["configs/sft.yaml"], words, check_paths=False)
    assert config.data_shares() == (1, 0, 0)


def test_latent_frames_are_said_as_frames_of_video() -> None:
    words = ["--prompt", "a cat", "args.sampling_num_frames=49"]
    config = load_run_config(["configs/sample.yaml"], words, purpose="sample")
    assert "args.sampling_num_frames = 49 latent frames: 193 frames of video." in config.notes

"""Sampler, guidance and position embedding of `docs/extend_reference.md`, from outside the package."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch

from sat_train.config import ModelSpec, RunConfig, load_run_config
from sat_train.config.explain import explain_key
from sat_train.config.extensions import load_extensions
from sat_train.config.json_schema import render_json_schema
from sat_train.diffusion.ddim import sample_ddim
from sat_train.diffusion.schedule import zero_snr_alpha_bar
from sat_train.distributed.processes import start_single_process
from sat_train.errors import CheckpointError, ConfigError
from sat_train.models.build import build_dit
from sat_train.models.dit.embedding import PatchGrid
from sat_train.models.dit.rotary import RotaryPositions
from sat_train.sampling.build import build_sampling
from sat_train.weights.diffusers_config import scheduler_config, transformer_config
from tests.ranks.extensions import write_extensions

GUIDER = "model.sampler_config.params.guider_config"
POSITION = "model.network_config.params.modules.pos_embed_config"
ETA, INTERVAL, RIFLEX = "eta_ddim", "interval_guidance", "riflex"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("extensions")
    write_extensions(path)
    return path


@pytest.fixture(autouse=True)
def _forget():
    yield
    load_extensions([])


def load(folder: Path, name: str, *words: str) -> RunConfig:
    extension = ["--extension", str(folder / f"{name}.py")]
    return load_run_config(["configs/sample.yaml"], ["args.prompt=a", *extension, *words], purpose="sample")


def test_a_sampler_without_its_noise_is_ddim_and_with_it_another(folder) -> None:
    alpha_bar, noise = zero_snr_alpha_bar(), torch.randn(2, 8, generator=torch.Generator().manual_seed(0))

    def sampled(sampler) -> torch.Tensor:
        return sampler(lambda x, t: x.sin() + t / 999, noise.clone, alpha_bar=alpha_bar, steps=7)

    eta = "model.sampler_config.params.eta=0"
    calm = build_sampling(load(folder, ETA, "args.sampler=EtaDDIM", eta)).sampler
    torch.testing.assert_close(sampled(calm), sampled(sample_ddim), rtol=1e-5, atol=1e-5)  # order of sums
    noisy = build_sampling(load(folder, ETA, "model.sampler_config.target=EtaDDIM")).sampler
    assert (sampled(noisy) - sampled(sample_ddim)).abs().max() > 0.1


def test_a_sampler_and_a_guidance_from_outside_generate_videos(folder, make_pipeline) -> None:
    pipeline = make_pipeline()
    size = {"num_frames": 1, "height": 16, "width": 16, "steps": 3, "seeds": [1]}
    settings = build_sampling(load(folder, ETA, "args.sampler=EtaDDIM", "args.guidance_scale=4"))
    generated = [
        pipeline.generate(["a"], guidance=settings.guidance, sampler=sampler, **size)
        for sampler in (settings.sampler, sample_ddim)
    ]
    assert not torch.equal(*generated)
    scales = ((f"{GUIDER}.params.last=0", "scale=1"), (f"{GUIDER}.params.last=999", "scale=4"))
    for word, scale in scales:
        ours = [f"{GUIDER}.target=IntervalGuidance", "args.guidance_scale=4", word]
        constant = [f"{GUIDER}.target=ConstantGuidance", f"{GUIDER}.params.{scale}"]
        videos = [
            pipeline.generate(["a"], guidance=build_sampling(load(folder, INTERVAL, *words)).guidance, **size)
            for words in (ours, constant)
        ]
        # without guidance the package evaluates the caption alone, in a batch of another size
        assert (videos[0].int() - videos[1].int()).abs().max() <= 1


def position_spec(folder: Path, *words: str) -> ModelSpec:
    return load(folder, RIFLEX, f"{POSITION}.target=RIFLEx", *words).spec


def test_a_position_embedding_from_outside_rotates_the_model(folder) -> None:
    start_single_process()
    spec = position_spec(folder, f"{POSITION}.params.component=3")
    ours, base = build_dit(spec, device="cpu", dtype=torch.float32), load(folder, RIFLEX).spec
    theirs = build_dit(base, device="cpu", dtype=torch.float32)
    for weight in ours.parameters():  # blocks that are the identity would hide the positions
        torch.nn.init.normal_(weight, std=0.05)
    theirs.load_state_dict(ours.state_dict())
    grid = PatchGrid(4, 2, 3)
    mine, released = (dit.mixins["pos_embed"] for dit in (ours, theirs))
    assert isinstance(mine, RotaryPositions)
    assert isinstance(released, RotaryPositions)
    changed = (mine.angles(grid, ours.device) != released.angles(grid, ours.device)).any(dim=0)
    assert changed.nonzero().flatten().tolist() == [2]
    assert mine.angles(grid, ours.device)[:, 2].max() < 2 * torch.pi, "it does not repeat"
    latent, text = (
        torch.randn(1, 4, spec.in_channels, 4, 6),
        torch.randn(1, 226, spec.text_width),
    )
    v_ours, v_theirs = (dit(latent, torch.tensor([500]), text) for dit in (ours, theirs))
    assert not torch.allclose(v_ours, v_theirs)


def test_what_diffusers_lacks_is_named(folder, caplog) -> None:
    with pytest.raises(CheckpointError, match=r"diffusers has no position embedding RIFLEx"):
        transformer_config(position_spec(folder))
    scheduler_config(load(folder, ETA, "args.sampler=EtaDDIM").spec)
    assert "diffusers has no sampler EtaDDIM, and will use DPMPP2M" in caplog.text


def test_another_sampler_keeps_the_settings_that_it_has_too(folder, tmp_path) -> None:
    earlier = tmp_path / "mine.yaml"
    earlier.write_text("model: {sampler_config: {target: EtaDDIM, params: {eta: 0.5, num_steps: 9}}}")
    extension = ["--extension", str(folder / f"{ETA}.py"), "args.prompt=a", "args.sampler=DDIM"]
    config = load_run_config(["configs/sample.yaml", earlier], extension, purpose="sample")
    assert (config.spec.sampler.target, config.spec.sampling_steps) == ("DDIM", 9)


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        (ETA, ["args.sampler=EtaDDIMM"], r"args\.sampler = EtaDDIMM: expected .*EtaDDIM.*mean 'EtaDDIM'"),
        (ETA, ["args.sampler=EtaDDIM", "model.sampler_config.params.etta=1"], r"etta = 1: .*mean 'eta'"),
        (INTERVAL, [f"{GUIDER}.target=Interval"], r"guider_config\.target = Interval: .*'IntervalGuidance'"),
        (
            INTERVAL,
            [f"{GUIDER}.target=IntervalGuidance", f"{GUIDER}.params.first=-1"],
            r"first = -1",
        ),
        (RIFLEX, [f"{POSITION}.target=RIFLEX"], r"pos_embed_config\.target = RIFLEX: .*mean 'RIFLEx'"),
        (ETA, ["args.sampler=EtaDDIM", "args.sampling_steps=1001"], r"num_steps = 1001: .* schedule's steps"),
    ],
)
def test_faults_are_named_with_a_suggestion(folder, name: str, words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(folder, name, *words)


def test_schema_explanations_and_copies_know_the_parts(folder) -> None:
    before = render_json_schema()
    config = load(folder, ETA, "args.sampler=EtaDDIM", "model.sampler_config.params.eta=0.5")
    assert pickle.loads(pickle.dumps(config.model)) == config.model
    assert "DDIM, DPMPP2M, EtaDDIM or null" in explain_key("args.sampler", None)
    assert "0 is DDIM, 1 is ancestral" in explain_key("model.sampler_config.params.eta", None)
    assert re.search(r'"enum": \[\s*"DDIM",\s*"DPMPP2M",\s*"EtaDDIM"', render_json_schema())
    load_extensions([])
    assert render_json_schema() == before

"""A branch in the layout of TheDenk/cogvideox-controlnet computes there what it does here.

The published forward is written out from the files of the folder, on diffusers' blocks, which it is built of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import CogVideoXPatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from safetensors.torch import load_file
from torch import Tensor

from sat_train.config import RunConfig, load_run_config
from sat_train.data.batches import VideoSample
from sat_train.data.sampler import AugmentationKey
from sat_train.distributed.processes import start_single_process
from sat_train.encoding.build import build_conditions, build_encoders
from sat_train.encoding.conditions.randomness import SampleRandomness
from sat_train.errors import CheckpointError, ConfigError
from sat_train.interchange.controlnet_folder import write_as_modules
from sat_train.interchange.conversion import Conversion, convert
from sat_train.interchange.module_files import check_module_files, read_module_files
from sat_train.models.build import build_dit
from sat_train.weights.diffusers_config import transformer_config
from sat_train.weights.diffusers_keys import transformer_to_diffusers
from tests.parity.families import randomize
from tests.parity.test_transformer import TOLERANCE, Rotary, relative_error
from tests.unit.checkpoint.lora_runs import commit_weights

FRAMES, HEIGHT, WIDTH = 9, 64, 96  # pixels; 3x8x12 latent elements
CASES = {
    "2b as released": ("cogvideox_2b", "{blocks: 2, projections: false, weight: 0.5}"),
    "5b as released": ("cogvideox_5b", "{blocks: 2, heads: 1}"),
    "5b_i2v, copied": ("cogvideox_5b_i2v", "{blocks: 3, weight: 0.7}"),
}


def narrow(model: str, params: str, *words: str) -> RunConfig:
    network = "model.network_config.params"
    own = [
        f"{network}.{name}={value}"
        for name, value in {
            "num_layers": 3,
            "hidden_size": 128,
            "num_attention_heads": 2,
            "time_embed_dim": 32,
            "num_frames": FRAMES,
            "latent_height": HEIGHT // 8,
            "latent_width": WIDTH // 8,
            "modules.patch_embed_config.params.text_hidden_size": 24,
            "modules.pos_embed_config.params.text_length": 6,
        }.items()
    ]
    own += ["model.conditioner_config.params.emb_models.0.params.max_length=6"]
    own += [f"data.params.video_size=[{HEIGHT},{WIDTH}]", f"data.params.max_num_frames={FRAMES}"]
    own += ["args.bf16=false", "args.fp16=false", f"model.modules.branch.params={params}"]
    files = [f"configs/model/{model}.yaml", "configs/sft.yaml", "configs/condition/control_pixels.yaml"]
    return load_run_config(files, [*own, *words], purpose="check", check_paths=False)


def encode_time(frames: list[Tensor]) -> list[Tensor]:
    """The first frame, then the means of pairs."""
    pairs = zip(frames[1::2], frames[2::2], strict=True)
    return [frames[0], *((first + second) / 2 for first, second in pairs)]


def published_states(
    config: Mapping[str, Any], weights: dict[str, Tensor], *, pixels_tchw: Tensor, given: dict[str, Any]
) -> list[Tensor]:
    """Returns the states of `CogVideoXControlnet` for one sample; takes from `weights` what it uses."""

    def fill(module: torch.nn.Module, prefix: str) -> torch.nn.Module:
        own = [key for key in weights if key.startswith(prefix)]
        module.load_state_dict({key.removeprefix(prefix): weights.pop(key) for key in own})
        return module

    frames = list(F.pixel_unshuffle(pixels_tchw, config["downscale_coef"]).split(1))
    for stage in ("controlnet_encode_first", "controlnet_encode_second"):
        conv, norm = ([weights.pop(f"{stage}.{i}.{kind}") for kind in ("weight", "bias")] for i in (0, 1))
        frames = [F.relu(F.group_norm(F.conv2d(frame, *conv), 2, *norm)) for frame in frames]
        frames = encode_time(frames)
    control = torch.cat(frames)[None].expand(2, -1, -1, -1, -1)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    embed = CogVideoXPatchEmbed(
        patch_size=config["patch_size"],
        in_channels=config["vae_channels"] + control.shape[2],
        embed_dim=width,
        text_embed_dim=24,  # 4096 in the released ones
        sample_width=config["sample_width"],
        sample_height=config["sample_height"],
        sample_frames=config["sample_frames"],
        temporal_compression_ratio=config["temporal_compression_ratio"],
        max_text_seq_length=config["max_text_seq_length"],
        spatial_interpolation_scale=config["spatial_interpolation_scale"],
        temporal_interpolation_scale=config["temporal_interpolation_scale"],
        use_positional_embeddings=not config["use_rotary_positional_embeddings"],
        use_learned_positional_embeddings=config["use_learned_positional_embeddings"],
    )
    noised = given["latent"][:, :, : config["vae_channels"]]
    tokens = fill(embed, "patch_embed.")(given["text"], torch.cat([noised, control], dim=2))
    features = Timesteps(width, config["flip_sin_to_cos"], config["freq_shift"])(given["timesteps"])
    time = fill(TimestepEmbedding(width, config["time_embed_dim"]), "time_embedding.")(features)
    length, states = given["text"].shape[1], []
    text, video = tokens[:, :length], tokens[:, length:]
    for index in range(config["num_layers"]):
        block = CogVideoXBlock(
            dim=width,
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
            time_embed_dim=config["time_embed_dim"],
            activation_fn=config["activation_fn"],
            attention_bias=config["attention_bias"],
            norm_elementwise_affine=config["norm_elementwise_affine"],
            norm_eps=config["norm_eps"],
        )
        fill(block, f"transformer_blocks.{index}.")
        video, text = block(video, text, time, image_rotary_emb=given["rotary"])
        states.append(video)
    if config["out_proj_dim"] is None:
        return states
    projectors = [torch.nn.Linear(width, config["out_proj_dim"]) for _ in states]
    return [
        fill(projector, f"out_projectors.{index}.")(states[index])
        for index, projector in enumerate(projectors)
    ]


def published_prediction(
    base: CogVideoXTransformer3DModel, states: list[Tensor], weight: float, given: dict[str, Any]
) -> Tensor:
    """Adds the states to what the first blocks of diffusers' model return for the video."""
    hooks = [
        block.register_forward_hook(lambda _, __, out, added=state: (out[0] + weight * added, out[1]))
        for block, state in zip(base.transformer_blocks, states, strict=False)
    ]
    tables = given["rotary"]
    out = base(given["latent"], given["text"], given["timesteps"], image_rotary_emb=tables).sample
    for hook in hooks:
        hook.remove()
    return out


def control_of(config: RunConfig, video_tchw: Tensor) -> Tensor:
    """Returns the tensor that the run's own condition makes of a control video."""
    encoders = build_encoders(config, torch.device("cpu"))
    condition = next(each for each in build_conditions(config, encoders) if each.name == "control")
    sample = VideoSample(
        clip_id="a",
        sample_index=0,
        num_shown=FRAMES,
        video_tchw=video_tchw,
        caption="",
        image_chw=None,
        augmentation=AugmentationKey(3, 5),
        fields={"control": video_tchw},
    )
    encoded = {name: tensor[None] for name, tensor in condition.encoded(sample, encoders).items()}
    shape = (1, 3, 16, HEIGHT // 8, WIDTH // 8)
    return condition.inputs(encoded, SampleRandomness(0, (0,)), shape).extras["control"]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_folder_computes_what_the_run_does_and_is_read_back(case: str, tmp_path: Path) -> None:
    mesh, config = start_single_process(), narrow(*CASES[case])
    spec, params = config.spec, config.spec.modules["branch"].params
    ours = build_dit(spec, device="cpu", dtype=torch.float32).eval()
    randomize(ours, seed=1)
    commit_weights(mesh, tmp_path / "run", 1, ours.state_dict())
    convert(Conversion(tmp_path / "run", tmp_path / "out", "controlnet", model=spec))
    written = json.loads((tmp_path / "out/config.json").read_text())
    weights = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")

    generator = torch.Generator().manual_seed(2)
    video = torch.randint(256, (FRAMES, 3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
    given: dict[str, Any] = {
        "latent": torch.randn(2, 3, spec.in_channels, 8, 12, generator=generator),
        "text": torch.randn(2, 6, 24, generator=generator),
        "timesteps": torch.tensor([7, 901]),
    }
    base = CogVideoXTransformer3DModel.from_config(transformer_config(spec)).float().eval()
    of_base = {key: tensor for key, tensor in ours.state_dict().items() if "branch" not in key}
    learned = "i2v" in case
    base.load_state_dict(transformer_to_diffusers(of_base, learned_positions=learned), strict=True)
    given["rotary"] = None if "2b" in case else Rotary(base).tables(3, 8, 12)
    left = dict(weights)
    states = published_states(written, left, pixels_tchw=video / 127.5 - 1, given=given)
    assert not left, "the class has no other weights"
    assert len(states) == params.blocks
    expected = published_prediction(base, states, params.weight, given)

    control = control_of(config, video).expand(2, -1, -1, -1, -1)
    noised, image = given["latent"][:, :, :16], given["latent"][:, :, 16:] if learned else None
    actual = ours(noised, given["timesteps"], given["text"], image, extras={"control": control})
    assert relative_error(actual, expected) < TOLERANCE
    without = ours(noised, given["timesteps"], given["text"], image, extras={"control": 0 * control})
    assert relative_error(without, expected) > 0.01

    convert(Conversion(tmp_path / "out", tmp_path / "modules", "modules"))
    check_module_files([tmp_path / "modules"], config, tmp_path / "run")
    back = read_module_files([tmp_path / "modules"])
    own = {key: tensor for key, tensor in ours.state_dict().items() if key.startswith("mixins.branch.")}
    assert back.keys() == own.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in own.items())
    other = narrow(CASES[case][0], "{blocks: 1}")
    with pytest.raises(
        ConfigError, match=rf"params\.blocks = 1: expected {params.blocks}, as it was trained"
    ):
        check_module_files([tmp_path / "modules"], other, tmp_path / "run")


def test_what_their_class_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    mesh, (model, params) = start_single_process(), CASES["5b as released"]
    spec = narrow(model, params).spec
    state = build_dit(spec, device="cpu", dtype=torch.float32).state_dict()
    commit_weights(mesh, tmp_path / "run", 1, state)

    def export(changed: RunConfig, name: str = "out") -> Path:
        return convert(Conversion(tmp_path / "run", tmp_path / name, "controlnet", model=changed.spec))

    newer = narrow("cogvideox1.5_5b", "{blocks: 2}")
    with pytest.raises(CheckpointError, match=r"cannot be \(CogVideoX 1\.5: their patches have one frame\)"):
        export(newer)
    latents = narrow(
        model,
        "{blocks: 2}",
        "model.modules.branch.target=ControlBranch",
        "model.conditions.control={target: ControlVideo, params: {into: extras}}",
    )
    with pytest.raises(
        CheckpointError, match=r"the modules branch \(ControlBranch\)\n  expected: one PixelC"
    ):
        export(latents)
    folder = export(narrow(model, params), "theirs")
    with pytest.raises(CheckpointError, match=r"holds no modules\.safetensors"):
        read_module_files([folder])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_rotary_positional_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"use_rotary_positional_embeddings: True there, False here"):
        write_as_modules(folder, tmp_path, metadata={})
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": "many"}))
    with pytest.raises(CheckpointError, match=r"config\.json: ValueError"):
        write_as_modules(folder, tmp_path, metadata={})

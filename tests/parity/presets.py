"""The shipped presets at a small size, and transformers built from them on both sides."""

from __future__ import annotations

import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor

from sat_train.config import ModelSpec, load_run_config
from sat_train.models.build import build_dit
from sat_train.models.dit.transformer import DiffusionTransformer
from tests.parity.families import randomize
from tests.parity.test_transformer import Rotary

PRESETS = ("cogvideox_2b", "cogvideox_5b", "cogvideox_5b_i2v", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v")
_NETWORK = "model.network_config.params"
_LORA = f"{_NETWORK}.modules.lora_config"
TEXT_LENGTH, TEXT_WIDTH = 6, 24


def narrow_model(preset: str, words: tuple[str, ...] = ()) -> ModelSpec:
    """Returns the numbers of a preset with 2 layers, 2 heads and small latents."""
    frames, height, width = (13, 16, 14) if "1.5" in preset else (17, 8, 12)
    sizes = {
        "num_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "time_embed_dim": 32,
        "num_frames": frames,
        "latent_height": height,
        "latent_width": width,
        "modules.pos_embed_config.params.text_length": TEXT_LENGTH,
        "modules.patch_embed_config.params.text_hidden_size": TEXT_WIDTH,
    }
    if preset == "cogvideox1.5_5b_i2v":
        sizes["ofs_embed_dim"] = 32
    return load_run_config(
        [f"configs/model/{preset}.yaml"],
        [
            *(f"{_NETWORK}.{key}={value}" for key, value in sizes.items()),
            "model.conditioner_config.params.emb_models.0.params.max_length=6",
            f"data.params.max_num_frames={frames}",
            f"data.params.video_size=[{height * 8},{width * 8}]",
            *words,
        ],
        purpose="check",
        check_paths=False,
    ).spec


def lora_words(*, rank: int, alpha: float, targets: str, kind: str = "Lora") -> tuple[str, ...]:
    """Returns what a command line says to get adapters."""
    return (
        "model.not_trainable_prefixes=[all]",
        f"{_LORA}.target={kind}",
        f"{_LORA}.params.r={rank}",
        f"{_LORA}.params.lora_alpha={alpha}",
        f"{_LORA}.params.targets={targets}",
    )


def random_transformer(model: ModelSpec, *, seed: int = 0) -> DiffusionTransformer:
    """Builds our transformer with noise in every weight, adapters and learned positions included."""
    dit = build_dit(model, device="cpu", dtype=torch.float32)
    randomize(dit, seed)
    return dit.eval()


def forward_pair(
    ours: DiffusionTransformer, theirs: CogVideoXTransformer3DModel, model: ModelSpec
) -> tuple[Tensor, Tensor]:
    """Returns what both make of one random input, `[b, t, c, h, w]`."""
    generator = torch.Generator().manual_seed(7)
    frames, height, width = model.trained_latent
    latent = torch.randn(2, frames, model.in_channels, height, width, generator=generator)
    text = torch.randn(2, TEXT_LENGTH, TEXT_WIDTH, generator=generator)
    timesteps = torch.tensor([17, 803])
    ofs = torch.full((1,), 2.0) if model.ofs_width else None
    rotary = None
    if theirs.config.use_rotary_positional_embeddings:
        rotary = Rotary(theirs).tables(frames, height, width)
    with torch.no_grad():
        our_v = ours(latent, timesteps, text, ofs_b=None if ofs is None else ofs.expand(2))
        their_v = theirs(
            hidden_states=latent,
            encoder_hidden_states=text,
            timestep=timesteps,
            ofs=ofs,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
    return our_v, their_v

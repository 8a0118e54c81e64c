"""A narrow pipeline of each family member, ours and diffusers', with the same random weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor

from sat_train.diffusion.schedule import zero_snr_alpha_bar
from sat_train.encoding.conditions.image import ImageCondition, OfsCondition
from sat_train.encoding.conditions.text import TextCondition
from sat_train.models.encoders import Encoders
from sat_train.models.vae.video_vae import VideoVAE
from sat_train.objective.video_diffusion import VideoDiffusion
from sat_train.weights.diffusers_keys import transformer_from_diffusers
from sat_train.weights.diffusers_vae_keys import vae_state_from_diffusers
from tests.parity.families import Family, randomize

SCALE_FACTOR = 0.7
SHIFT_SCALE = 3.0


class TableTextEncoder:
    """Stands for T5, which has its own parity test: a fixed random embedding for each caption."""

    def __init__(self, family: Family) -> None:
        self.shape = (family.text_length, family.text_width)

    def encode(self, captions: Sequence[str]) -> Tensor:
        seeds = [sum(caption.encode()) for caption in captions]
        return torch.stack(
            [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )


def pipeline_pair(
    family: Family, **options: object
) -> tuple[VideoDiffusion, CogVideoXTransformer3DModel, AutoencoderKLCogVideoX]:
    """Builds our pipeline, and diffusers' transformer and autoencoder it was converted from."""
    transformer = family.theirs().eval()
    randomize(transformer, seed=1)
    if family.positions == "rotary_learned":
        table = transformer.patch_embed.pos_embedding
        table.normal_(generator=torch.Generator().manual_seed(2)).requires_grad_()
    invert = family.image_to_video and family.patch_frames > 1
    their_vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 16),
        latent_channels=family.out_channels,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=SCALE_FACTOR,
        invert_scale_latents=invert,
    ).eval()
    randomize(their_vae, seed=4)
    dit = family.ours()
    missing, unexpected = dit.load_state_dict(
        transformer_from_diffusers(transformer.state_dict()), strict=False
    )
    assert (set(missing), unexpected) == (dit.derived_keys(), [])
    vae = VideoVAE(
        ch=8, ch_mult=(1, 1, 1, 2), num_res_blocks=1, z_channels=family.out_channels, norm_num_groups=4
    ).eval()
    vae.load_state_dict(vae_state_from_diffusers(their_vae.state_dict()))
    vae.requires_grad_(False)
    encoders = Encoders(
        load_vae=lambda: vae,
        load_text_encoder=lambda: TableTextEncoder(family),
        geometry=dit.spec,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    encoders.load()
    image_scale = 1 / SCALE_FACTOR if invert else SCALE_FACTOR
    pipeline = VideoDiffusion(
        dit=dit,
        encoders=encoders,
        conditions=[
            TextCondition(null="zero", empty_prompt=encoders.empty_prompt),
            *([ImageCondition(scale=image_scale)] if family.image_to_video else []),
            *([OfsCondition(2.0)] if family.ofs else []),
        ],
        alpha_bar=zero_snr_alpha_bar(1000, SHIFT_SCALE),
        scale_factor=SCALE_FACTOR,
        **options,
    )
    return pipeline, transformer, their_vae

"""Keys of CogVideo's files that accept a single value here; any other value is refused by name.

They name classes that have no alternative, and options that the family never used. Nothing reads them, so
they are not part of the schema.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticUndefined

from sat_train.config.aliases import get_value, remove_value
from sat_train.config.catalog import suggest_value
from sat_train.config.layers import Merged
from sat_train.config.sat_forks import about_class
from sat_train.config.values import show_value
from sat_train.errors import Fault

_NETWORK = "model.network_config.params"
_TEXT = "model.conditioner_config.params.emb_models.0"
_VAE = "model.first_stage_config.params"
_DENOISER = "model.denoiser_config.params"
_TIMESTEPS = "model.loss_fn_config.params.sigma_sampler_config"
_SGM = "sgm.modules.diffusionmodules"
_SCHEDULE = ("ZeroSNRDDPMDiscretization", f"{_SGM}.discretizer.ZeroSNRDDPMDiscretization")

# The values that each key accepts, classes under our name and CogVideo's.
FIXED: dict[str, tuple[Any, ...]] = {
    "data.target": ("VideoDataset", "data_video.SFTDataset"),
    "model.noised_image_all_concat": (False,),
    f"{_NETWORK}.time_compressed_rate": (4,),
    f"{_NETWORK}.transformer_args.layernorm_order": ("pre",),
    f"{_NETWORK}.transformer_args.is_decoder": (False,),
    f"{_NETWORK}.modules.patch_embed_config.target": (
        "ImagePatchEmbedding",
        "dit_video_concat.ImagePatchEmbeddingMixin",
    ),
    f"{_NETWORK}.modules.adaln_layer_config.target": ("AdaLN", "dit_video_concat.AdaLNMixin"),
    f"{_NETWORK}.modules.final_layer_config.target": ("FinalLayer", "dit_video_concat.FinalLayerMixin"),
    "model.conditioner_config.target": (
        *("GeneralConditioner", "sgm.modules.GeneralConditioner"),
        "sgm.modules.encoders.modules.GeneralConditioner",
    ),
    f"{_TEXT}.target": ("T5TextEncoder", "sgm.modules.encoders.modules.FrozenT5Embedder"),
    f"{_TEXT}.is_trainable": (False,),
    f"{_TEXT}.input_key": ("txt",),
    "model.first_stage_config.target": (
        *("VideoVAE", "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper"),
        "vae_modules.autoencoder.VideoAutoencodingEngine",
    ),
    f"{_VAE}.cp_size": (0, 1),
    f"{_VAE}.loss_config.target": ("Identity", "torch.nn.Identity"),
    f"{_VAE}.regularizer_config.target": (
        "DiagonalGaussian",
        "vae_modules.regularizers.DiagonalGaussianRegularizer",
    ),
    f"{_VAE}.encoder_config.target": ("VideoEncoder3D", "vae_modules.cp_enc_dec.ContextParallelEncoder3D"),
    f"{_VAE}.decoder_config.target": ("VideoDecoder3D", "vae_modules.cp_enc_dec.ContextParallelDecoder3D"),
    **{
        f"{_VAE}.{half}.params.{key}": (value,)
        for half in ("encoder_config", "decoder_config")
        for key, value in {"double_z": True, "attn_resolutions": [], "dropout": 0.0}.items()
    },
    "model.denoiser_config.target": ("DiscreteDenoiser", f"{_SGM}.denoiser.DiscreteDenoiser"),
    f"{_DENOISER}.quantize_c_noise": (False,),
    f"{_DENOISER}.weighting_config.target": ("EpsWeighting", f"{_SGM}.denoiser_weighting.EpsWeighting"),
    f"{_DENOISER}.scaling_config.target": ("VideoScaling", f"{_SGM}.denoiser_scaling.VideoScaling"),
    f"{_DENOISER}.discretization_config.target": _SCHEDULE,
    "model.loss_fn_config.target": ("VideoDiffusionLoss", f"{_SGM}.loss.VideoDiffusionLoss"),
    f"{_TIMESTEPS}.params.discretization_config.target": _SCHEDULE,
    "model.sampler_config.params.discretization_config.target": _SCHEDULE,
}
# These groups have no other keys.
WITHOUT_SETTINGS = (
    f"{_NETWORK}.modules.final_layer_config",
    f"{_VAE}.loss_config",
    f"{_DENOISER}.weighting_config",
    f"{_DENOISER}.scaling_config",
)


def only_value(path: str) -> str:
    """Returns in words the only value that a key accepts; an empty text for all other keys."""
    allowed = FIXED.get(path)
    return "" if allowed is None else show_value(allowed[0])


def drop_fixed_keys(merged: Merged, faults: list[Fault]) -> None:
    """Removes the keys that accept a single value.

    Args:
        merged: Changed in place, before it is validated.
        faults: Receives those that hold another value.
    """
    for path, allowed in FIXED.items():
        value = get_value(merged.tree, path)
        if value is PydanticUndefined:
            continue
        if not any(_is_same(value, one) for one in allowed):
            text, expected = show_value(value), show_value(allowed[0])
            suggestion = suggest_value(text, [expected])
            expected += about_class(path, text)
            faults.append(Fault(path, text, expected, merged.source_of(path), suggestion))
        remove_value(merged, path)
    for group in WITHOUT_SETTINGS:
        if get_value(merged.tree, group) in (None, {}, {"params": {}}):
            remove_value(merged, group)


def _is_same(value: Any, allowed: Any) -> bool:
    """Returns whether a value equals the allowed one: 0 and 0.0 are equal, 0 and false are not."""
    return bool(value == allowed) and isinstance(value, bool) == isinstance(allowed, bool)

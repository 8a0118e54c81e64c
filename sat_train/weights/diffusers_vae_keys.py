"""Maps the VAE's weight names between SAT's `3d-vae.pt` and diffusers' `AutoencoderKLCogVideoX`.

The tensors are the same.

Source: THUDM/CogVideo@7a1af71 `tools/convert_weight_sat2hf.py` VAE_KEYS_RENAME_DICT, VAE_SPECIAL_KEYS_REMAP.
There the number of levels is fixed at four and the renaming is by substring; here both are exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from sat_train.errors import CheckpointError

_SAT_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(?:block\.(\d+)|(?:down|up)sample)\.(.+)")
_SAT_MIDDLE = re.compile(r"((?:en|de)coder)\.mid\.block_([12])\.(.+)")
_DIFFUSERS_LEVEL = re.compile(
    r"(?:en|de)coder\.(down|up)_blocks\.(\d+)\.(?:resnets\.(\d+)|(?:down|up)samplers\.0)\.(.+)"
)
_DIFFUSERS_MIDDLE = re.compile(r"((?:en|de)coder)\.mid_block\.resnets\.([01])\.(.+)")
_SAME_IN_BOTH = re.compile(r"(?:en|de)coder\.(?:conv_in|norm_out|conv_out)\..+")


def is_diffusers_vae(state_dict: Mapping[str, Tensor]) -> bool:
    """Returns whether the names are those of `AutoencoderKLCogVideoX`."""
    return any(_DIFFUSERS_LEVEL.fullmatch(key) for key in state_dict)


def vae_state_to_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames SAT's VAE weights for diffusers.

    Args:
        state_dict: `encoder.*` and `decoder.*` of SAT's `3d-vae.pt`; its `loss.*` (discriminator) is left
            out.

    Returns:
        The same tensors under diffusers' names.

    Raises:
        CheckpointError: A name that belongs to neither.
    """
    num_levels = _num_levels(state_dict, r"decoder\.up\.(\d+)\.")
    coders = {key: value for key, value in state_dict.items() if not key.startswith("loss.")}
    return _renamed(coders, lambda key: _key_to_diffusers(key, num_levels))


def vae_state_from_diffusers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames diffusers' VAE weights for SAT.

    Args:
        state_dict: Of `AutoencoderKLCogVideoX`.

    Returns:
        The same tensors under SAT's names.

    Raises:
        CheckpointError: A name that belongs to neither.
    """
    num_levels = _num_levels(state_dict, r"decoder\.up_blocks\.(\d+)\.")
    return _renamed(state_dict, lambda key: _key_from_diffusers(key, num_levels))


def _num_levels(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    levels = [int(match[1]) for key in state_dict if (match := re.match(pattern, key))]
    return max(levels, default=-1) + 1


def _renamed(state_dict: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    names = {key: rename(key) for key in state_dict}
    unknown = [key for key, name in names.items() if name is None]
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} weights do not belong to a CogVideoX VAE: {', '.join(unknown[:8])}",
            expected="encoder.* and decoder.*, as in SAT's 3d-vae.pt or diffusers' vae/ folder",
            remedy="check that the path is the VAE's and not the transformer's",
        )
    return {name: state_dict[key] for key, name in names.items() if name is not None}


def _key_to_diffusers(key: str, num_levels: int) -> str | None:
    if match := _SAT_LEVEL.fullmatch(key):
        part, level, block, rest = match[1], int(match[2]), match[3], match[4]
        is_up = part == "decoder.up"
        index = num_levels - 1 - level if is_up else level
        sampler = "upsamplers.0" if is_up else "downsamplers.0"
        inside = f"resnets.{block}" if block else sampler
        return f"{part}_blocks.{index}.{inside}.{rest.replace('nin_shortcut', 'conv_shortcut')}"
    if match := _SAT_MIDDLE.fullmatch(key):
        return f"{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{match[3]}"
    return key if _SAME_IN_BOTH.fullmatch(key) else None


def _key_from_diffusers(key: str, num_levels: int) -> str | None:
    if match := _DIFFUSERS_LEVEL.fullmatch(key):
        direction, index, block, rest = match[1], int(match[2]), match[3], match[4]
        part = "decoder.up" if direction == "up" else "encoder.down"
        level = num_levels - 1 - index if direction == "up" else index
        inside = f"block.{block}" if block else f"{direction}sample"
        return f"{part}.{level}.{inside}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
    if match := _DIFFUSERS_MIDDLE.fullmatch(key):
        return f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
    return key if _SAME_IN_BOTH.fullmatch(key) else None

"""Numbers of a model -> the frozen video VAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sat_train.config import ModelSpec
from sat_train.log import get_logger
from sat_train.models.vae.tiling import Tiling
from sat_train.models.vae.video_vae import VideoVAE

log = get_logger(__name__)

_CUDNN_WITH_HALF_CONV3D = 91500


def build_vae(
    spec: ModelSpec,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    check: Callable[[VideoVAE], None] = lambda outline: None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VideoVAE:
    """Builds the VAE, frozen and in evaluation mode.

    Args:
        spec: The numbers of the model.
        state_dict: Its weights under SAT's names, any dtype; None leaves it uninitialised, for the meta
            device.
        check: Called with the VAE on the meta device, before it takes the weights.
        device: "meta" allocates nothing.
        dtype: Of the weights and the computation; fp32 or bf16.

    Returns:
        The VAE.
    """
    warn_of_slow_conv3d(torch.device(device), dtype)
    own = spec.vae
    tiles = Tiling(*own.tile_size, *own.tile_overlap)
    with torch.device("meta"):
        vae = VideoVAE(
            **spec.coder.model_dump(),
            encode_chunk_frames=own.encode_chunk_frames,
            decode_chunk_frames=own.decode_chunk_frames,
            clips_at_once=own.clips_at_once,
            tiling=tiles if own.tiling else None,
            sample_tiling=tiles if own.tile_samples else None,
        )
    check(vae)
    if state_dict is not None:
        vae.load_state_dict(state_dict, assign=True)
    vae = vae.to(dtype=dtype)
    vae = vae.to_empty(device=device) if state_dict is None else vae.to(device)
    return vae.eval().requires_grad_(False)


def warn_of_slow_conv3d(device: torch.device, dtype: torch.dtype) -> None:
    """Warns if PyTorch computes 3D convolutions in half precision without cuDNN.

    They then take up to 20 times the time and three times the memory. PyTorch 2.10 brings cuDNN 9.10.

    Source: pytorch/pytorch issue 166643.
    """
    version = torch.backends.cudnn.version() or 0
    if device.type == "cuda" and dtype != torch.float32 and version < _CUDNN_WITH_HALF_CONV3D:
        log.warning(
            "cuDNN %d.%d is older than 9.15: the VAE in %s will be slow and may run out of memory; "
            "remedy: pip install -U nvidia-cudnn-cu12 (nvidia-cudnn-cu13 for CUDA 13), or a newer torch",
            *(version // 10000, version % 10000 // 100, str(dtype).removeprefix("torch.")),
        )

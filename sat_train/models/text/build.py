"""Numbers of a model -> the frozen text encoder."""

from __future__ import annotations

import torch

from sat_train.config import T5TextEncoderParams
from sat_train.models.text.t5 import T5TextEncoder


def build_text_encoder(
    params: T5TextEncoderParams,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> T5TextEncoder:
    """Reads the text encoder from its folder.

    Args:
        params: Its folder, and the length of captions.
        device: Where it goes.
        dtype: fp32 or bf16.

    Returns:
        The encoder, frozen.

    Raises:
        CheckpointError: See `T5TextEncoder.from_folder`.
    """
    return T5TextEncoder.from_folder(
        params.model_dir, max_length=params.max_length, dtype=dtype, device=device
    )

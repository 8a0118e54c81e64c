"""The base class of position embeddings, and the check of the sizes that a table serves."""

from __future__ import annotations

import torch
from sat.model.base_model import BaseMixin
from torch import Tensor

from sat_train.errors import ConfigError, Fault
from sat_train.models.dit.embedding import PatchGrid

Device = torch.device | str

_SIZE_POLICY_KEY = "model.network_config.params.modules.pos_embed_config.params.size_policy"


class PositionEmbedding(BaseMixin):
    """A position embedding: positions that are added to the tokens, rotary angles, or both.

    A weight whose name ends in `pos_embedding` begins at zero, any other as a linear layer's.
    """

    def position_embedding_forward(self, grid: PatchGrid, text_length: int) -> Tensor | None:
        """SAT hook: positions that are added to the tokens, `[1, text_length + grid.tokens, d]`, or None."""
        return None

    def rotation(self, grid: PatchGrid, text_length: int, device: torch.device) -> Tensor | None:
        """Returns cosine and sine of the angles of all tokens, fp32 `[l, k / 2, 2]`; None rotates nothing."""
        return None


def is_prefix(own: PatchGrid, grid: PatchGrid) -> bool:
    """Returns whether a table for `own` begins with that for `grid`: the same area, and no more frames."""
    return grid[1:] == own[1:] and grid.frames <= own.frames


def check_size(own: PatchGrid, grid: PatchGrid, *, size_policy: str) -> None:
    """Checks whether a table may serve another size.

    Raises:
        ConfigError: The policy is `refuse`.
    """
    if size_policy == "refuse":
        expected = f"{own} patches (frames x height x width), as the position table has, not {grid}"
        remedy = "train at that size, or set the policy to interpolate"
        raise ConfigError([Fault(_SIZE_POLICY_KEY, size_policy, f"{expected}; {remedy}")])

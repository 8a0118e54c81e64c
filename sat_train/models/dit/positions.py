"""The base class of position embeddings, and the check of the sizes that a table serves."""

from __future__ import annotations

import torch
from sat.model.base_model import BaseMixin
from torch import Tensor

from sat_train.errors import ConfigError, Fault, SatTrainError
from sat_train.models.dit.embedding import PatchGrid

Device = torch.device | str
Times = tuple[float, ...]

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

    def frame_positions(self, grid: PatchGrid, times: Times) -> Tensor | None:
        """Returns positions that are added to the tokens of appended frames, `[1, tokens, d]`, or None.

        Args:
            grid: Patches of the video.
            times: Time of each appended patch of frames, in patches.

        Raises:
            SatTrainError: There are none for these times.
        """
        raise SatTrainError(
            f"{type(self).__name__} has no positions for frames that are appended in time",
            expected="a position embedding with `frame_positions` and `frame_rotation`",
        )

    def frame_rotation(self, grid: PatchGrid, times: Times, device: torch.device) -> Tensor | None:
        """Returns cosine and sine of the angles of appended frames; None rotates nothing."""
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

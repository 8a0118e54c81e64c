"""Preference pairs: clips that lost against a sample's own join the batch as rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sat_train.encoding.conditions.condition import Condition
from sat_train.encoding.encoded_batch import CLIP, MOMENTS, EncodedBatch


def add_losers(batch: EncodedBatch, conditions: Sequence[Condition]) -> EncodedBatch:
    """Returns a batch with the losers of its samples as further rows, for conditions that `adds_rows`.

    The rows are all samples, then each sample's first loser, and so on. Rows of one sample have its index,
    and therefore its noise, timestep, drop-out and posterior's random numbers, and the same encodings of all
    other conditions.

    Args:
        batch: Encoded samples.
        conditions: The conditions; the encodings `mean` and `logvar` of one that `adds_rows` are those of
            its losers, `[b, n, t, c, h, w]`, and are the clips' own in the result.
    """
    names = [condition.name for condition in conditions if condition.adds_rows]
    if not names:
        return batch
    encodings = {name: encoding for name, encoding in batch.encodings.items() if name not in names}
    clip = encodings.pop(CLIP)
    rows = {part: _rows(clip[part], [batch.encodings[name][part] for name in names]) for part in MOMENTS}
    count = len(rows["mean"]) // len(batch.sample_indices)
    return replace(
        batch,
        encodings={
            CLIP: rows,
            **{
                name: {part: torch.cat([tensor] * count) for part, tensor in encoding.items()}
                for name, encoding in encodings.items()
            },
        },
        clip_ids=batch.clip_ids * count,
        sample_indices=batch.sample_indices * count,
        num_shown=batch.num_shown * count,
        step_positions=batch.step_positions * count,
    )


def _rows(winners: Tensor, losers: Sequence[Tensor]) -> Tensor:
    return torch.cat([winners, *(each.transpose(0, 1).flatten(0, 1) for each in losers)])

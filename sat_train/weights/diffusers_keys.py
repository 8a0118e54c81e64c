"""Maps the transformer's weight names between diffusers and SAT: one table, read in both directions.

SAT fuses what diffusers keeps apart: q, k, v in one weight, and both modulations of a block in one. So each
diffusers tensor consists of some of the equal chunks of the first dim of one SAT tensor.

Source: zai-org/CogVideo@7a1af71 `tools/convert_weight_sat2hf.py`; huggingface/diffusers@0.42
    `CogVideoXTransformer3DModel`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sat_train.errors import CheckpointError
from sat_train.weights.lazy import LazyTensor, LazyWeights, Shard, from_tensors, shard_tensor


class Part(NamedTuple):
    """A diffusers tensor as chunks of a SAT tensor.

    Args:
        diffusers_key: Name of the diffusers tensor.
        sat_key: Name of the SAT tensor that contains it.
        chunks: Indices of its chunks among `pieces` equal chunks of the SAT tensor's first dim, in its own
            order.
        pieces: Number of chunks of the SAT tensor; 1 if the two tensors are the same.
    """

    diffusers_key: str
    sat_key: str
    chunks: tuple[int, ...]
    pieces: int


_POSITIONS = Part("patch_embed.pos_embedding", "mixins.pos_embed.pos_embedding", (0,), 1)

# diffusers module, SAT module, chunks, pieces; every module has a weight and a bias
_MODULES: tuple[tuple[str, str, tuple[int, ...], int], ...] = (
    ("patch_embed.proj", "mixins.patch_embed.proj", (0,), 1),
    ("patch_embed.text_proj", "mixins.patch_embed.text_proj", (0,), 1),
    ("time_embedding.linear_1", "time_embed.0", (0,), 1),
    ("time_embedding.linear_2", "time_embed.2", (0,), 1),
    ("ofs_embedding.linear_1", "ofs_embed.0", (0,), 1),
    ("ofs_embedding.linear_2", "ofs_embed.2", (0,), 1),
    ("norm_final", "transformer.final_layernorm", (0,), 1),
    ("norm_out.norm", "mixins.final_layer.norm_final", (0,), 1),
    ("norm_out.linear", "mixins.final_layer.adaLN_modulation.1", (0,), 1),
    ("proj_out", "mixins.final_layer.linear", (0,), 1),
    # block N; SAT's modulation: shift, scale, gate of attention, then of MLP; first for video, then for text
    ("transformer_blocks.N.attn1.to_q", "transformer.layers.N.attention.query_key_value", (0,), 3),
    ("transformer_blocks.N.attn1.to_k", "transformer.layers.N.attention.query_key_value", (1,), 3),
    ("transformer_blocks.N.attn1.to_v", "transformer.layers.N.attention.query_key_value", (2,), 3),
    ("transformer_blocks.N.attn1.to_out.0", "transformer.layers.N.attention.dense", (0,), 1),
    ("transformer_blocks.N.attn1.norm_q", "mixins.adaln_layer.query_layernorm_list.N", (0,), 1),
    ("transformer_blocks.N.attn1.norm_k", "mixins.adaln_layer.key_layernorm_list.N", (0,), 1),
    ("transformer_blocks.N.norm1.norm", "transformer.layers.N.input_layernorm", (0,), 1),
    ("transformer_blocks.N.norm1.linear", "mixins.adaln_layer.adaLN_modulations.N.1", (0, 1, 2, 6, 7, 8), 12),
    ("transformer_blocks.N.norm2.norm", "transformer.layers.N.post_attention_layernorm", (0,), 1),
    (
        "transformer_blocks.N.norm2.linear",
        "mixins.adaln_layer.adaLN_modulations.N.1",
        (3, 4, 5, 9, 10, 11),
        12,
    ),
    ("transformer_blocks.N.ff.net.0.proj", "transformer.layers.N.mlp.dense_h_to_4h", (0,), 1),
    ("transformer_blocks.N.ff.net.2", "transformer.layers.N.mlp.dense_4h_to_h", (0,), 1),
)

_UNDERSCORED = {diffusers.replace(".", "_"): diffusers for diffusers, *_ in _MODULES}

_NUMBER = re.compile(
    r"(transformer_blocks|layers|adaLN_modulations|query_layernorm_list|key_layernorm_list)\.(\d+)"
)


def part_of_diffusers_key(key: str) -> Part | None:
    """Returns the place of a diffusers tensor in SAT's weights, or None for any other key."""
    return next(iter(_find(key, side=0)), None)


def parts_of_sat_key(key: str) -> tuple[Part, ...]:
    """Returns the diffusers tensors that make up a SAT tensor; none for an unknown key."""
    return _find(key, side=1)


def module_of_underscores(name: str) -> str | None:
    """Returns the diffusers module for kohya's spelling, in which every dot is an underscore."""
    number = re.search(r"(?<=^transformer_blocks_)\d+", name)
    generic = name if number is None else f"transformer_blocks_N{name[number.end() :]}"
    module = _UNDERSCORED.get(generic)
    return module if module is None or number is None else module.replace(".N.", f".{number[0]}.")


def transformer_to_diffusers(
    weights: Mapping[str, Tensor], *, learned_positions: bool = False
) -> LazyWeights:
    """Renames and splits SAT's transformer weights for diffusers, each on access.

    Args:
        weights: All weights of the transformer under SAT's keys, without prefix or adapters, not sliced.
        learned_positions: Include the position table, which is learned (5B-I2V); otherwise diffusers computes
            it.

    Raises:
        CheckpointError: A key does not belong to the transformer.
    """
    weights = _lazy(weights)
    parts_by_key = {key: parts_of_sat_key(key) for key in weights}
    _check_known([key for key, parts in parts_by_key.items() if not parts], "SAT")
    if not learned_positions:
        parts_by_key.pop(_POSITIONS.sat_key, None)
    read_whole = lru_cache(maxsize=1)(weights.__getitem__)  # consecutive parts are of the same tensor
    tensors = {
        part.diffusers_key: _split(weights.tensors[key], part, read_whole)
        for key, parts in parts_by_key.items()
        for part in parts
    }
    return LazyWeights(tensors, where=weights.where)


def _split(whole: LazyTensor, part: Part, read_whole: Callable[[str], Tensor]) -> LazyTensor:
    def read(shard: Shard | None) -> Tensor:
        chunks = read_whole(part.sat_key).chunk(part.pieces)
        chosen = [chunks[index] for index in part.chunks]
        return shard_tensor(chosen[0] if len(chosen) == 1 else torch.cat(chosen), shard)

    rows = whole.shape[0] // part.pieces * len(part.chunks)
    return LazyTensor((rows, *whole.shape[1:]), whole.dtype, read)


def transformer_from_diffusers(weights: Mapping[str, Tensor]) -> LazyWeights:
    """Renames and fuses the weights of a diffusers transformer for SAT: undoes `transformer_to_diffusers`.

    A position table that is not learned is not included: the model computes it
    (`DiffusionTransformer.derived_keys`).

    Raises:
        CheckpointError: A key does not belong to the transformer, or a part of a fused weight is missing.
    """
    weights = _lazy(weights)
    part_by_key = {key: part_of_diffusers_key(key) for key in weights}
    _check_known([key for key, part in part_by_key.items() if part is None], "diffusers")
    sat_keys = dict.fromkeys(part.sat_key for part in part_by_key.values() if part is not None)
    return LazyWeights({key: _fused(key, weights) for key in sat_keys}, where=weights.where)


def _fused(sat_key: str, weights: LazyWeights) -> LazyTensor:
    parts = parts_of_sat_key(sat_key)
    missing = [part.diffusers_key for part in parts if part.diffusers_key not in weights.tensors]
    if missing:
        raise CheckpointError(
            f"{weights.where} lacks {', '.join(missing)}, a part of {sat_key}",
            remedy="download the folder again, all shards of it",
        )
    sources = [weights.tensors[part.diffusers_key] for part in parts]
    if len(parts) == 1:
        return sources[0]

    def read(shard: Shard | None) -> Tensor:
        # each of diffusers' tensors is one of the parts that are sharded by themselves
        assert shard is None or shard.parts == len(parts), f"{sat_key} is made of {len(parts)} parts"
        own = None if shard is None else replace(shard, parts=1)
        chunks: dict[int, Tensor] = {}
        for part, source in zip(parts, sources, strict=True):
            chunks.update(zip(part.chunks, source.read(own).chunk(len(part.chunks)), strict=True))
        return torch.cat([chunks[index] for index in sorted(chunks)])

    first = sources[0]
    rows = first.shape[0] // len(parts[0].chunks) * parts[0].pieces
    return LazyTensor((rows, *first.shape[1:]), first.dtype, read)


def _lazy(weights: Mapping[str, Tensor]) -> LazyWeights:
    return weights if isinstance(weights, LazyWeights) else from_tensors(weights, where="the model")


def _find(key: str, *, side: int) -> tuple[Part, ...]:
    """Returns the table's rows for a key of diffusers (side 0) or of SAT (side 1)."""
    if key == _POSITIONS[side]:
        return (_POSITIONS,)
    module, _, kind = key.rpartition(".")
    if kind not in ("weight", "bias"):
        return ()
    number = _NUMBER.search(module)
    generic = _NUMBER.sub(r"\1.N", module)
    layer = f".{number.group(2)}" if number else ""
    return tuple(
        Part(f"{diffusers.replace('.N', layer)}.{kind}", f"{sat.replace('.N', layer)}.{kind}", chunks, pieces)
        for diffusers, sat, chunks, pieces in _MODULES
        if generic == (diffusers, sat)[side]
    )


def _check_known(strangers: list[str], family: str) -> None:
    if strangers:
        names = ", ".join(strangers[:5]) + (f" and {len(strangers) - 5} more" if len(strangers) > 5 else "")
        raise CheckpointError(
            f"{len(strangers)} weights do not belong to a CogVideoX transformer: {names}",
            expected=f"the keys of a {family} CogVideoX transformer",
        )

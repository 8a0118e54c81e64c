"""Trained state as fragments: contiguous elements of one parameter with their optimizer state.

Each rank saves the fragments that it owns. A reader can request any contiguous elements of any parameter, so
a state loads into any number of ranks, ZeRO stage and tensor-parallel size. The weights of an export and the
moving average are read in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat_train.checkpoint.layout import fragments_file_name
from sat_train.checkpoint.manifest import Manifest
from sat_train.errors import CheckpointError
from sat_train.files import reading
from sat_train.weights.lazy import LazyTensor, LazyWeights, Shard, shard_tensor
from sat_train.weights.names import Shape
from sat_train.weights.readers import check_all_plain, load_torch_file
from sat_train.weights.tensor_parallel import merge_slices, slice_weights

MASTER = "master"  # the fp32 weights
AVERAGE = "ema"  # their exponential moving average
PIECE = "piece"  # weights that the network computes with; only while a checkpoint is written

Scalar = float | int


@dataclass(frozen=True)
class Fragment:
    """Contiguous elements of one trained parameter, owned by one rank of the data axis.

    Args:
        name: The parameter's name in the transformer.
        shape: Shape of the parameter; under tensor parallelism, of this rank's shard.
        offset: Index of the first element in the flattened parameter.
        tensors: [n] each, by kind: `master`, the optimizer's state per element, `ema`.
        scalars: Numbers of the parameter as a whole, such as Adam's `step`.
        indivisible: Optimizer state of the parameter as a whole in tensors of any shape and dtype, such as a
            factored second moment. The fragment with the first element has it.
    """

    name: str
    shape: Shape
    offset: int
    tensors: dict[str, Tensor]
    scalars: dict[str, Scalar] = field(default_factory=dict)
    indivisible: dict[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of elements."""
        return next(iter(self.tensors.values())).numel()


def pack_fragments(fragments: Iterable[Fragment]) -> dict[str, Any]:
    """Returns fragments as plain values and tensors, for `torch.save`."""
    return {"fragments": [dict(vars(fragment)) for fragment in fragments]}


class SavedFragments:
    """Fragments of a committed step, sharded for one rank of the model axis.

    Args:
        saved: The fragments of all data ranks, for each rank of the model axis that saved.
        where: Their source, for messages.
        model_rank: Rank on the model axis of this run.
        model_size: Size of the model axis of this run.

    Raises:
        CheckpointError: Elements of a parameter are missing or duplicated.
    """

    def __init__(
        self, saved: Sequence[Sequence[Fragment]], *, where: str, model_rank: int = 0, model_size: int = 1
    ) -> None:
        self.where = where
        self._runs = [_by_name(fragments, where) for fragments in saved]
        self._rank, self._size = model_rank, model_size
        self._sharded: dict[str, LazyWeights] = {}

    def kinds(self, name: str) -> tuple[str, ...]:
        """Returns the kinds of state that are saved for each element of a parameter."""
        return tuple(self._runs[0][name][0].tensors)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every parameter on this rank."""
        return self._of_kind(MASTER).shapes

    def read(self, name: str, kind: str, *, offset: int, count: int) -> Tensor:
        """Reads contiguous elements of this rank's flattened parameter.

        Returns:
            [count], memory-mapped if the file holds it in one piece.

        Raises:
            CheckpointError: There is no such parameter or kind.
        """
        if self._size == len(self._runs):
            pieces = [fragment.tensors[kind] for fragment in self._runs[self._rank][name]]
            return read_run(pieces, offset, count, self.where)
        return self._of_kind(kind)[name].flatten()[offset : offset + count]

    def scalars(self, name: str) -> dict[str, Scalar]:
        """Returns the numbers of a parameter as a whole."""
        return self._runs[0][name][0].scalars

    def indivisible(self, name: str) -> dict[str, Tensor]:
        """Returns the optimizer state of a parameter that fits no other size of the model axis.

        Raises:
            CheckpointError: There is such a state, and the model axis has another size.
        """
        same_size = self._size == len(self._runs)
        state = self._runs[self._rank if same_size else 0][name][0].indivisible
        if state and not same_size:
            raise CheckpointError(
                f"{self.where} holds {', '.join(state)} of {name}, which cannot be sharded",
                expected=f"args.model_parallel_size = {len(self._runs)}",
            )
        return state

    def whole(self, kind: str) -> LazyWeights:
        """Returns every parameter whole, whatever the size of the model axis."""
        shards = [_assembled(runs, kind, self.where) for runs in self._runs]
        return merge_slices(shards, where=self.where)

    def _of_kind(self, kind: str) -> LazyWeights:
        if kind not in self._sharded:
            self._sharded[kind] = slice_weights(self.whole(kind), rank=self._rank, size=self._size)
        return self._sharded[kind]


def read_fragments(
    folder: Path, manifest: Manifest, *, model_rank: int = 0, model_size: int = 1
) -> SavedFragments:
    """Opens the fragments of a committed step; tensors are memory-mapped, not read.

    Args:
        folder: The step folder.
        manifest: Its manifest.
        model_rank: Rank on the model axis of this run.
        model_size: Size of the model axis of this run.

    Raises:
        CheckpointError: A file is missing or damaged, or lacks elements of a parameter.
    """
    expected = "the fragments of a step, as sat_train writes them"
    with reading(folder, error=CheckpointError, expected=expected, remedy="use another step"):
        fragments = [_read_model_rank(folder, manifest, rank) for rank in range(manifest.model_size)]
        return SavedFragments(fragments, where=str(folder), model_rank=model_rank, model_size=model_size)


def _read_model_rank(folder: Path, manifest: Manifest, model_rank: int) -> list[Fragment]:
    ranks = [manifest.global_rank(data_rank, model_rank) for data_rank in range(manifest.data_size)]
    return [fragment for rank in ranks for fragment in read_fragment_file(folder / fragments_file_name(rank))]


def read_fragment_file(path: Path) -> list[Fragment]:
    """Opens the fragments that one rank wrote; tensors are memory-mapped.

    Raises:
        CheckpointError: The file is damaged.
    """
    state = load_torch_file(path)
    check_all_plain(path, state)
    return [_checked(path, Fragment(**entry)) for entry in state["fragments"]]


def _checked(path: Path, fragment: Fragment) -> Fragment:
    """Checks the fields of a fragment before anything is taken from it."""
    is_shape = type(fragment.shape) is tuple and all(type(n) is int and n >= 0 for n in fragment.shape)
    is_named = type(fragment.name) is str and type(fragment.offset) is int and fragment.offset >= 0
    scalars_are_numbers = all(type(value) in (int, float) for value in fragment.scalars.values())
    are_runs = bool(fragment.tensors) and all(
        isinstance(tensor, Tensor) and tensor.shape == (fragment.count,) and tensor.is_floating_point()
        for tensor in fragment.tensors.values()
    )
    are_tensors = all(isinstance(tensor, Tensor) for tensor in fragment.indivisible.values())
    if not (is_shape and is_named and scalars_are_numbers and are_runs and are_tensors):
        raise CheckpointError(
            f"{path} holds a fragment that is not understood: {str(fragment.name)[:80]}",
            expected="a name, a shape, an offset, and floating-point vectors of one length",
            remedy="use another step",
        )
    return fragment


def _by_name(fragments: Sequence[Fragment], where: str) -> dict[str, list[Fragment]]:
    """Sorts fragments by parameter and offset, and checks that they hold each element once."""
    runs: dict[str, list[Fragment]] = {}
    for fragment in sorted(fragments, key=lambda each: (each.name, each.offset)):
        runs.setdefault(fragment.name, []).append(fragment)
    for name, run in runs.items():
        end = 0
        for fragment in run:
            is_next = fragment.offset == end and fragment.shape == run[0].shape
            if not is_next or fragment.tensors.keys() != run[0].tensors.keys():
                raise _incomplete(where, name, end)
            end += fragment.count
        if end != math.prod(run[0].shape):
            raise _incomplete(where, name, end)
    return runs


def _incomplete(where: str, name: str, end: int) -> CheckpointError:
    return CheckpointError(
        f"{where}: elements of {name} are missing or there twice, from {end} on",
        expected="every element once",
        remedy="use another step",
    )


def assemble(fragments: Sequence[Fragment], kind: str, *, where: str) -> LazyWeights:
    """Returns whole parameters from the fragments of all data ranks.

    Raises:
        CheckpointError: Elements of a parameter are missing or duplicated.
    """
    return _assembled(_by_name(fragments, where), kind, where)


def _assembled(runs: dict[str, list[Fragment]], kind: str, where: str) -> LazyWeights:
    tensors = {
        name: joined([fragment.tensors[kind] for fragment in run], run[0].shape, where)
        for name, run in runs.items()
        if kind in run[0].tensors
    }
    return LazyWeights(tensors, where=where)


def joined(pieces: Sequence[Tensor], shape: Shape, where: str) -> LazyTensor:
    """Returns the tensor whose flattened elements are the concatenation of 1-D `pieces`."""

    def read(shard: Shard | None) -> Tensor:
        return shard_tensor(read_run(pieces, 0, math.prod(shape), where).view(shape), shard)

    return LazyTensor(shape, pieces[0].dtype, read)


def read_run(pieces: Sequence[Tensor], offset: int, count: int, where: str) -> Tensor:
    """Returns `count` elements from `offset` on of the concatenation of 1-D `pieces`, in host memory.

    Raises:
        CheckpointError: The pieces hold fewer elements.
    """
    parts, start = [], 0
    for piece in pieces:
        first, last = max(offset - start, 0), min(offset + count - start, piece.numel())
        if first < last:
            parts.append(piece[first:last].cpu())
        start += piece.numel()
    run = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else pieces[0][:0].cpu()
    if run.numel() != count:
        raise CheckpointError(
            f"{where} ends {count - run.numel()} elements early",
            expected="as many elements as its shapes call for",
            remedy="use another step",
        )
    return run

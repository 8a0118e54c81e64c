"""Fits the weights of a base into a model that has more: a wider input, other tables, further modules.

What the file lacks is zero where it is added to what the base computes, so the model starts as the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_train.config import NetworkSpec
from sat_train.errors import CheckpointError
from sat_train.models.adapter import adapter_state_dict
from sat_train.models.dit.embedding import PatchGrid
from sat_train.models.dit.initialization import initialize_parameter
from sat_train.models.dit.rotary import interpolate_table
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.weights.lazy import LazyTensor, LazyWeights

PROJECTION = "mixins.patch_embed.proj.weight"
_TABLE = "mixins.pos_embed.pos_embedding"
_OFS = "ofs_embed."
_OFS_OUT = "ofs_embed.2."
_MOST_TEXT = 1024  # rows of a table above it are not text


@dataclass(frozen=True)
class FittedWeights:
    """Weights of a file in the shapes of a model.

    Args:
        weights: The tensors that the file gives.
        absent: Names of the base's weights that the file need not give.
        widened_from: Input channels of the file, if the model has more.
    """

    weights: LazyWeights
    absent: frozenset[str] = frozenset()
    widened_from: int | None = None


def fit_weights(dit: DiffusionTransformer, weights: LazyWeights) -> FittedWeights:
    """Fits weights of a base into the shapes of a model; all others are compared when they load.

    The base may read fewer channels: those of text-to-video, or those of the model without what its
    conditions append. Text-to-video weights need neither `ofs` nor a learned table of positions.

    Args:
        dit: The model, of which shapes alone are read.
        weights: Whole weights under SAT's keys.

    Raises:
        CheckpointError: They read another number of channels, or have a table of another size.
    """
    spec, tensors = dit.spec, dict(weights.tensors)
    channels = _channels_of(tensors.get(PROJECTION), spec)
    widened_from = None
    if channels is not None and channels != spec.in_channels:
        _check_channels(channels, spec, where=weights.where)
        widened_from, shape = channels, tuple(dit.state_dict()[PROJECTION].shape)
        tensors[PROJECTION] = _changed(tensors[PROJECTION], shape, _widen)
    if _TABLE in tensors and _TABLE in dit.state_dict():
        _fit_table(tensors, dit, where=weights.where)
    absent: frozenset[str] = frozenset()
    if widened_from == spec.out_channels < spec.in_channels - spec.condition_channels:  # now image-to-video
        own = (name for name in dit.state_dict() if name.startswith(_OFS) or name == _TABLE)
        absent = frozenset(name for name in own if name not in tensors)
    return FittedWeights(LazyWeights(tensors, where=weights.where), absent, widened_from)


@torch.no_grad()
def fill_absent(dit: DiffusionTransformer, absent: Iterable[str], *, seed: int) -> None:
    """Fills weights that an image-to-video model has beyond its base: what they add is zero."""
    parameters = dict(dit.named_parameters())
    for name in absent:
        if name.startswith(_OFS) and not name.startswith(_OFS_OUT):
            fan_in = parameters[f"{name.rpartition('.')[0]}.weight"].shape[1]
            initialize_parameter(name, parameters[name], seed=seed, fan_in=fan_in)
        else:
            parameters[name].zero_()


def _channels_of(lazy: LazyTensor | None, spec: NetworkSpec) -> int | None:
    """Returns the channels that a projection of patches reads; None for one of another width or patch."""
    if lazy is None or lazy.shape[0] != spec.width:
        return None
    channels, rest = divmod(math.prod(lazy.shape[1:]), math.prod(spec.patch))
    return channels if rest == 0 else None


def _check_channels(channels: int, spec: NetworkSpec, *, where: str) -> None:
    base = spec.in_channels - spec.condition_channels
    known = sorted({spec.out_channels, base, spec.in_channels})
    if channels in known and channels < spec.in_channels:
        return
    raise CheckpointError(
        f"{where} reads {channels} channels and the model {spec.in_channels}: which of them correspond is "
        "not known",
        expected=f"weights that read {' or '.join(map(str, known))} channels",
        remedy="image-to-video weights need an image-to-video preset, and weights of a run with conditions "
        "the same conditions",
    )


def _changed(lazy: LazyTensor, shape: tuple[int, ...], change: Callable[..., Tensor]) -> LazyTensor:
    # neither the projection nor a table is sharded
    return replace(lazy, shape=shape, read=lambda shard: change(lazy.read(None), shape))


def _widen(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Appends zero columns: channels are the outermost of a patch's numbers."""
    flat = weight.flatten(1)
    return F.pad(flat, (0, math.prod(shape[1:]) - flat.shape[1])).reshape(shape)


def _fit_table(tensors: dict[str, LazyTensor], dit: DiffusionTransformer, *, where: str) -> None:
    shape, lazy = tuple(dit.state_dict()[_TABLE].shape), tensors[_TABLE]
    if lazy.shape == shape or len(lazy.shape) != len(shape) or lazy.shape[-1] != shape[-1]:
        return
    if _TABLE in dit.derived_keys():
        del tensors[_TABLE]  # the model has computed its own
        return
    text, grid, found = dit.spec.text_length, PatchGrid(*dit.spec.trained_patches), lazy.shape[1]
    other_text, area = found - grid.tokens, grid.height * grid.width
    frames, rest = divmod(found - text, area)
    is_text, is_time = 0 < other_text <= _MOST_TEXT, rest == 0 < frames
    if is_text == is_time:
        raise CheckpointError(
            f"{where}: its table of positions has {found} rows, the model's {shape[1]}",
            expected=f"{text} rows of text and {grid.tokens} of {grid} patches, or another text length or "
            "number of frames: another height or width cannot be converted",
            remedy="keep latent_height, latent_width and num_frames of the weights, and set size_policy: "
            "interpolate for other sizes",
        )

    def changed(table: Tensor, _: tuple[int, ...]) -> Tensor:
        num_text = other_text if is_text else text
        rows, video = table[0].split([num_text, found - num_text])
        if is_text:
            rows = F.pad(rows[:text], (0, 0, 0, max(0, text - len(rows))))
        else:
            video = video[: grid.tokens]
            if frames < grid.frames:
                video = interpolate_table(video, PatchGrid(frames, *grid[1:]), grid)
        return torch.cat([rows, video])[None]

    tensors[_TABLE] = _changed(lazy, shape, changed)


@dataclass(frozen=True)
class Surgery:
    """Parts of a model that the weights that it has loaded do not contain.

    Args:
        modules: Names of new network modules.
        channels: Input channels of the file.
        projection: The file's projection of patches, if the model's is wider.
    """

    modules: frozenset[str]
    channels: int
    projection: Tensor | None = None

    @property
    def is_any(self) -> bool:
        """True if there is a difference from the base."""
        return bool(self.modules) or self.projection is not None


@dataclass
class SurgeryTable:
    """Numbers of weights by their origin and prefix: copied from the file or the base, zeroed, or new."""

    counts: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, *, copied: int = 0, zeroed: int = 0, new: int = 0) -> None:
        """Counts the elements of one tensor."""
        depth = 2 if name.startswith(("transformer.", "mixins.")) else 1
        row = self.counts.setdefault(".".join(name.split(".")[:depth]), [0, 0, 0])
        for column, count in enumerate((copied, zeroed, new)):
            row[column] += count

    def __str__(self) -> str:
        width = max(map(len, self.counts), default=0)
        lines = [f"{'':{width}}  {'copied':>15}  {'zeroed':>15}  {'new':>15}"]
        lines += [
            f"{prefix:{width}}  {copied:>15,}  {zeroed:>15,}  {new:>15,}"
            for prefix, (copied, zeroed, new) in sorted(self.counts.items())
        ]
        return "\n".join(lines)


def describe_surgery(
    dit: DiffusionTransformer,
    file_shapes: Mapping[str, tuple[int, ...]],
    before: Mapping[str, int],
) -> SurgeryTable:
    """Counts where the weights of a model come from, after loading and after `reinit` of its new modules.

    Args:
        dit: The model; a rank of the model axis counts its slice.
        file_shapes: Shapes of the tensors in the file, of this rank's slice.
        before: `versions` of the weights before `reinit`.
    """
    table, derived = SurgeryTable(), dit.derived_keys() | adapter_state_dict(dit).keys()
    for name, tensor in dit.state_dict().items():
        count = tensor.numel()
        if name in file_shapes:
            copied = min(count, math.prod(file_shapes[name]))
            table.add(name, copied=copied, zeroed=count - copied)
        elif name in derived:
            continue
        elif not bool(tensor.any()):
            table.add(name, zeroed=count)
        elif tensor._version != before[name]:
            table.add(name, copied=count)
        else:
            table.add(name, new=count)
    return table


def versions(dit: DiffusionTransformer) -> dict[str, int]:
    """Returns a number for each weight that changes when it is written to."""
    return {name: tensor._version for name, tensor in dit.state_dict().items()}

"""Counts a step at the model's own size on the meta device, where nothing is allocated.

Every tensor that our own code makes is counted while it lives. Attention counts as a flash kernel's does.
Not counted: workspaces of libraries, fragmentation.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sat_train.config import RunConfig
from sat_train.errors import CheckpointError
from sat_train.models.build import build_dit, compute_dtype, encoder_dtype
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.encoders import captions_at_once
from sat_train.models.frozen_layers import hold_frozen_weights
from sat_train.models.text.t5_encoder import T5_XXL, T5Encoder, T5Settings
from sat_train.models.text.t5_folder import find_t5_folders, read_settings
from sat_train.models.trainable import select_configured
from sat_train.models.vae.build import build_vae
from sat_train.models.vae.video_vae import VideoVAE

# blocks of the two models that are counted; all blocks keep and take the same, so the rest is a line
_DEPTHS = (2, 4)
_NOT_MOVING = ("mm", "addmm", "bmm", "baddbmm", "_unsafe_view")  # their time depends on arithmetic


class LivingTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as each lives.

    Args:
        apart_from: A module whose weights are not counted: operations return views of them.

    Attributes:
        peak: The most bytes that lived at once.
    """

    def __init__(self, apart_from: nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()
        weights = (*apart_from.parameters(), *apart_from.buffers())
        self._weights = [tensor.untyped_storage() for tensor in weights]
        self._known.update(storage._cdata for storage in self._weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        weakref.finalize(storage, self._forget, key, size)
        self._now += size
        self.peak = max(self.peak, self._now)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


class Traffic(TorchDispatchMode):
    """Adds up the bytes that elementwise operations read and write.

    Attributes:
        moved: The bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name in _NOT_MOVING or "empty" in name or "attention" in name:
            return result
        read = bytes_in(args[1:] if name == "copy_" else args)
        self.moved += bytes_in(result) + (0 if "zeros" in name or "fill" in name else read)
        if name == "native_layer_norm" and not args[0].is_contiguous():
            self.moved += 2 * bytes_in(args[0])  # its kernel makes a contiguous copy first
        return result


def bytes_in(value: Any) -> int:
    """Returns the bytes of the distinct elements of all tensors."""
    if isinstance(value, Tensor):
        sizes = (size for size, stride in zip(value.shape, value.stride(), strict=True) if stride)
        return math.prod(sizes) * value.element_size()
    return sum(map(bytes_in, value)) if isinstance(value, (tuple, list)) else 0


@contextmanager
def flash_attention() -> Iterator[None]:
    """Computes attention by the flash kernel inside, which has a version for the meta device."""
    own = F.scaled_dot_product_attention

    def flash(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return out

    F.scaled_dot_product_attention = flash  # type: ignore[assignment]  # modes do not see what is recomputed
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


@dataclass(frozen=True)
class Work:
    """Work of one rank in a forward and backward pass, or in another run of a network.

    Args:
        moved_bytes: Read and written by elementwise operations.
        linear_flops: Of matrix products and convolutions; a multiply-add is two.
        attention_flops: Of attention's forward, what is recomputed included.
        attention_backward_flops: Of its backward, in which a flash kernel computes the scores again.
    """

    moved_bytes: float
    linear_flops: float
    attention_flops: float
    attention_backward_flops: float

    @property
    def flops(self) -> float:
        """All of them."""
        return self.linear_flops + self.attention_flops + self.attention_backward_flops


def count_peak(config: RunConfig, *, batch_size: int, training: bool = True) -> float:
    """Returns the bytes that a forward and backward pass takes, without weights and their gradients.

    Args:
        config: Model, size of the clips and what is recomputed.
        batch_size: Samples.
        training: Off: a forward pass without gradients.
    """
    low, high = (_peak(*_pass(config, batch_size, layers, training)) for layers in _depths(config))
    return _extrapolated(config, low, high)


def count_work(config: RunConfig, *, batch_size: int, training: bool = True) -> Work:
    """Returns the work of a forward and backward pass; see `count_peak`."""
    low, high = (_work(_pass(config, batch_size, layers, training)[1]) for layers in _depths(config))
    names = [each.name for each in fields(Work)]
    return Work(*(_extrapolated(config, getattr(low, name), getattr(high, name)) for name in names))


def _depths(config: RunConfig) -> tuple[int, int]:
    """Returns the layers of the two models that are counted; modules act in blocks that these must have."""
    return (config.spec.layers,) * 2 if _counts_modules(config) else _DEPTHS


def _counts_modules(config: RunConfig) -> bool:
    """Returns whether there are modules, and the shape of all that conditions give them is known."""
    return bool(config.spec.modules) and all(config.spec.condition_widths.values())


def _extrapolated(config: RunConfig, low: float, high: float) -> float:
    if low == high:
        return low
    return low + (high - low) * (config.spec.layers - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])


def _pass(
    config: RunConfig, batch_size: int, layers: int, training: bool
) -> tuple[nn.Module, Callable[[], Any]]:
    """Returns a transformer of a few layers, and its pass."""
    dit = build_meta_dit(config, layers=layers).train(training)
    hold_frozen_weights(dit, device=torch.device("meta"), quantization=config.args.quantize_base)
    inputs = _inputs(config, batch_size)
    for parameter in dit.parameters():
        if parameter.requires_grad:  # its gradient is counted with the states
            parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def run() -> None:
        with torch.set_grad_enabled(training):
            loss = dit(**inputs).float().square().mean()
        if training:
            loss.backward()

    return dit, run


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _peak(module: nn.Module, run: Callable[[], Any]) -> int:
    living = LivingTensors(module)
    with flash_attention(), living:
        run()
    return living.peak


def _work(run: Callable[[], Any]) -> Work:
    traffic, flops = Traffic(), FlopCounterMode(display=False)
    with flash_attention(), flops, traffic:
        run()
    by_operation = {str(name): count for name, count in flops.get_flop_counts()["Global"].items()}
    attention = {name: count for name, count in by_operation.items() if "attention" in name}
    backward = sum(count for name, count in attention.items() if "backward" in name)
    linear = flops.get_total_flops() - sum(attention.values())
    return Work(traffic.moved, linear, sum(attention.values()) - backward, backward)


def peak_of_encoding(config: RunConfig) -> float:
    """Returns the bytes that the autoencoder's encoding of one clip takes."""
    return _peak(*_encoding(config))


def work_of_encoding(config: RunConfig) -> Work:
    """Returns the work of the autoencoder's encoding of one clip."""
    return _work(_encoding(config)[1])


def peak_of_captions(config: RunConfig) -> float:
    """Returns the bytes that T5 takes for the captions that precompute gives it together on a GPU."""
    count = captions_at_once(config.require_data().captions_at_once, on_gpu=True)
    ids = torch.empty(count, config.spec.text.max_length, dtype=torch.int64, device="meta")
    encoder = build_meta_text_encoder(config)
    return _peak(encoder, partial(encoder, ids))


def peak_of_decoding(config: RunConfig) -> float:
    """Returns the bytes that the autoencoder's decoding of one video takes."""
    vae = build_meta_vae(config)
    return _peak(vae, partial(vae.decode, _latent(config, 1, vae.z_channels), vae.sample_tiling))


def _encoding(config: RunConfig) -> tuple[nn.Module, Callable[[], Any]]:
    vae, data = build_meta_vae(config), config.require_data().params
    clip = torch.empty(1, data.max_num_frames, 3, *data.video_size, device="meta")
    return vae, partial(vae.encode_moments, clip)


def build_meta_dit(config: RunConfig, *, layers: int | None = None) -> DiffusionTransformer:
    """Builds the transformer of a run on the meta device, with what trains selected.

    Args:
        config: The configuration.
        layers: Blocks; None: the model's.
    """
    spec = replace(config.spec, layers=layers or config.spec.layers)
    if layers is not None and not _counts_modules(config):
        spec = replace(spec, modules={})
    dit = build_dit(
        spec,
        device="meta",
        dtype=compute_dtype(config.args),
        recompute=config.args.checkpoint_activations,
        recompute_every=config.args.checkpoint_every,
        inputs_on_host=config.args.checkpoint_offload,
        initialize=False,
    )
    select_configured(dit, config.model)
    return dit


def build_meta_vae(config: RunConfig) -> VideoVAE:
    """Builds the autoencoder of a run on the meta device."""
    return build_vae(config.spec, device="meta", dtype=encoder_dtype(config.args))


def build_meta_text_encoder(config: RunConfig) -> T5Encoder:
    """Builds the text encoder of a run on the meta device; where its folder is not there, T5-XXL."""
    try:
        settings = T5Settings(**read_settings(find_t5_folders(Path(config.spec.text.model_dir))[0]))
    except CheckpointError:
        settings = T5_XXL
    with torch.device("meta"):
        return T5Encoder(settings).to(encoder_dtype(config.args)).requires_grad_(False)


def _latent(config: RunConfig, batch_size: int, channels: int) -> Tensor:
    data = config.require_data().params
    latent = config.spec.latent(data.max_num_frames, *data.video_size)
    shape = (batch_size, latent.padded_frames, channels, latent.height, latent.width)
    return torch.empty(shape, device="meta", dtype=compute_dtype(config.args))


def _inputs(config: RunConfig, batch_size: int) -> dict[str, Any]:
    spec, dtype = config.spec, compute_dtype(config.args)
    text = (batch_size, spec.text.max_length, spec.text_width)
    inputs: dict[str, Any] = {
        "latent_btchw": _latent(config, batch_size, spec.in_channels),
        "extras": {
            name: _latent(config, batch_size, width) for name, width in spec.condition_widths.items() if width
        },
        "timesteps_b": torch.empty(batch_size, dtype=torch.int64, device="meta"),
        "text_bld": torch.empty(text, device="meta", dtype=dtype),
    }
    if spec.ofs_width:
        inputs["ofs_b"] = torch.empty(batch_size, device="meta", dtype=dtype)
    return inputs

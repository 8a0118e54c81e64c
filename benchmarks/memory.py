"""Prints what training and sampling need of one GPU, counted on the meta device: nothing is allocated.

    python benchmarks/memory.py                                             # every model of the family
    python benchmarks/memory.py --base configs/model/cogvideox_5b.yaml      # one
    python benchmarks/memory.py --recompute                                 # by args.checkpoint_activations

Every tensor that our own code makes is counted while it lives, at the model's own size. Attention counts as a
flash kernel's does. Not counted: workspaces of libraries, fragmentation.
These are computed figures; docs/benchmarks.md has the measured ones.
"""

from __future__ import annotations

import argparse
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sat_train.config import RunConfig, load_run_config
from sat_train.config.parts.optimizer_parts import AdamParams
from sat_train.distributed.processes import start_single_process
from sat_train.models.build import build_dit
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.trainable import select_configured
from sat_train.models.vae.build import build_vae

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GB = 1e9
T5_XXL_WEIGHTS = 4.762e9  # google/t5-v1_1-xxl, encoder only
CONTEXT_GB = 2  # CUDA context and NCCL: not counted, added to what the configuration files say
_STATES = 4 + AdamParams.bytes_per_weight()  # a trained weight: fp32 master and moments
_UPDATE = 4 + 4 - 2  # fp32 gradient and foreach's temporary, in place of the half-precision gradient


class LivingTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as each lives.

    Args:
        apart_from: A module whose weights are not counted: operations return views of them.

    Attributes:
        peak: The most bytes that lived at once.
    """

    def __init__(self, apart_from: torch.nn.Module) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: set[int] = set()
        self._weights = [
            tensor.untyped_storage() for tensor in apart_from.state_dict(keep_vars=True).values()
        ]
        self._known.update(storage._cdata for storage in self._weights)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
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


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns the output of flash attention, which runs on the meta device too."""
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return out


@contextmanager
def _counting(module: torch.nn.Module) -> Iterator[LivingTensors]:
    attention = "torch.nn.functional.scaled_dot_product_attention"
    with mock.patch(attention, flash_attention), LivingTensors(module) as living:
        yield living


@dataclass(frozen=True)
class Need:
    """Bytes on one GPU.

    Args:
        weights: Of the transformer, in half precision.
        states: Gradients, masters, optimizer states and ZeRO's bucket.
        passes: Highest count during one forward and backward pass.
        update: What the optimizer's step takes besides, when activations are gone.
        encoders: Text encoder and autoencoder, which stay where samples are not cached.
    """

    weights: float
    states: float
    passes: float
    update: float
    encoders: float

    @property
    def cached(self) -> float:
        """With all encodings in the cache and no validation videos."""
        return self.weights + self.states + max(self.passes, self.update)

    @property
    def total(self) -> float:
        """Total memory, including text encoder and autoencoder."""
        return self.cached + self.encoders


def training_need(config: RunConfig, *, gpus: int, passes: float) -> Need:
    """Adds up what one training step needs.

    Args:
        config: Model and recipe; the ZeRO stage is read from it.
        gpus: Data ranks.
        passes: From `count_passes`.
    """
    dit = _build_dit(config)
    total = sum(parameter.numel() for parameter in dit.parameters())
    trained = sum(parameter.numel() for parameter in dit.parameters() if parameter.requires_grad)
    zero = config.deepspeed.zero_optimization
    split = {0: (1, 1), 1: (1, gpus), 2: (gpus, gpus), 3: (gpus, gpus)}[config.args.zero_stage]
    gradients, states = 2 * trained / split[0], _STATES * trained / split[1]
    bucket = 2 * min(zero.reduce_bucket_size, trained)
    return Need(
        weights=2 * total / (gpus if config.args.zero_stage == 3 else 1),
        states=gradients + states + bucket,
        passes=passes,
        update=_UPDATE * trained / split[1],
        encoders=2
        * (T5_XXL_WEIGHTS + sum(parameter.numel() for parameter in _build_vae(config).parameters())),
    )


def sampling_need(config: RunConfig) -> tuple[float, float]:
    """Counts sampling one video: all weights, and what denoising or decoding adds, whichever is more.

    Returns:
        Bytes as configured, and with the text encoder moved off the GPU.
    """
    vae = _build_vae(config)
    weights = 2 * sum(p.numel() for module in (vae, _build_dit(config)) for p in module.parameters())
    latent = _latent(config, batch_size=1, channels=vae.z_channels)
    with torch.no_grad(), _counting(vae) as decoding:
        vae.decode(latent)
    denoising = _denoising(config)
    most = weights + max(decoding.peak, denoising)
    return most + 2 * T5_XXL_WEIGHTS, most


def _build_dit(config: RunConfig, *, layers: int | None = None) -> DiffusionTransformer:
    dit = build_dit(
        replace(config.spec, layers=layers or config.spec.layers),
        device="meta",
        dtype=torch.bfloat16,
        recompute=config.args.checkpoint_activations,
        recompute_every=config.args.checkpoint_every,
        initialize=False,
    )
    select_configured(dit, config.model)
    return dit


def _build_vae(config: RunConfig) -> torch.nn.Module:
    return build_vae(config.spec, device="meta", dtype=torch.bfloat16)


def count_passes(config: RunConfig, *, batch_size: int) -> float:
    """Counts what a forward and backward pass takes at the model's own size.

    Two depths are counted and the rest is extrapolated: all blocks keep and take the same.
    """
    low, high = (_peak_of_step(config, batch_size, layers) for layers in (2, 4))
    return low + (high - low) / 2 * (config.spec.layers - 2)


def _peak_of_step(config: RunConfig, batch_size: int, num_layers: int) -> int:
    dit = _build_dit(config, layers=num_layers)
    inputs = _inputs(config, batch_size)
    for parameter in dit.parameters():
        if parameter.requires_grad:  # its gradient is counted with the states
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with _counting(dit) as living:
        dit(**inputs).float().square().mean().backward()
    return living.peak


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _denoising(config: RunConfig) -> int:
    """Prediction with and without the prompt in one batch; blocks free what they took."""
    dit = _build_dit(config, layers=2).eval()
    with torch.no_grad(), _counting(dit) as living:
        dit(**_inputs(config, batch_size=2))
    return living.peak


def _latent(config: RunConfig, *, batch_size: int, channels: int) -> torch.Tensor:
    data = config.require_data().params
    latent = config.spec.latent(data.max_num_frames, *data.video_size)
    shape = (batch_size, latent.padded_frames, channels, latent.height, latent.width)
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def _inputs(config: RunConfig, batch_size: int) -> dict[str, torch.Tensor]:
    spec = config.spec
    text = (batch_size, spec.text.max_length, spec.text_width)
    inputs = {
        "latent_btchw": _latent(config, batch_size=batch_size, channels=spec.in_channels),
        "timesteps_b": torch.empty(batch_size, dtype=torch.int64, device="meta"),
        "text_bld": torch.empty(text, device="meta", dtype=torch.bfloat16),
    }
    if spec.ofs_width:
        inputs["ofs_b"] = torch.empty(batch_size, device="meta", dtype=torch.bfloat16)
    return inputs


def real_models() -> list[Path]:
    """Returns the files of the released models."""
    return sorted(path for path in (CONFIGS / "model").glob("*.yaml") if "tiny" not in path.stem)


def load(model: str | Path, recipe: str, *words: str) -> RunConfig:
    """Reads a model file with a recipe, placeholders and all."""
    files = [model, CONFIGS / f"{recipe}.yaml"]
    return load_run_config(files, words, purpose="check", check_paths=False)


@dataclass(frozen=True)
class Figures:
    """GB of one GPU, rounded up, with the context: what the head of a configuration file says.

    Args:
        sft_8: Full fine-tuning on 8 GPUs, by samples a GPU.
        sft_1: The same on one GPU, one sample.
        lora: LoRA on one GPU, by samples.
        encoders: What text encoder and autoencoder add.
        sample: Sampling one video.
    """

    sft_8: tuple[int, int]
    sft_1: int
    lora: tuple[int, int]
    encoders: int
    sample: int


def figures(model: Path) -> Figures:
    """Counts everything for one model file."""
    sft, lora = load(model, "sft"), load(model, "lora")
    sft_passes, lora_passes = ([count_passes(config, batch_size=b) for b in (1, 2)] for config in (sft, lora))
    on_8 = [training_need(sft, gpus=8, passes=passes) for passes in sft_passes]
    on_1 = training_need(sft, gpus=1, passes=sft_passes[0])
    adapters = [training_need(lora, gpus=1, passes=passes) for passes in lora_passes]
    return Figures(
        sft_8=(_whole(on_8[0].cached), _whole(on_8[1].cached)),
        sft_1=_whole(on_1.cached),
        lora=(_whole(adapters[0].cached), _whole(adapters[1].cached)),
        encoders=round(on_8[0].encoders / GB),
        sample=_whole(sampling_need(sft)[0]),
    )


def _whole(count: float) -> int:
    return math.ceil(count / GB + CONTEXT_GB)


def lora_gb(config: RunConfig) -> int:
    """Returns GB of one GPU for LoRA with one sample, everything cached, rounded up, with the context."""
    return _whole(training_need(config, gpus=1, passes=count_passes(config, batch_size=1)).cached)


def hardware_lines(model: Path) -> str:
    """Returns what the head of a model file says about GPU memory."""
    need = figures(model)
    lora = need.lora
    return f"""\
# Hardware   SFT on 8 GPUs with ZeRO-2: {need.sft_8[0]} GB each at 1 sample a GPU, {need.sft_8[1]} GB at 2.
#            SFT on 1 GPU: {need.sft_1} GB. LoRA on 1 GPU: {lora[0]} GB at 1 sample, {lora[1]} GB at 2.
#            Without a complete cache, or with validation videos, {need.encoders} GB more: T5 and autoencoder.
#            Sampling: {need.sample} GB. All computed by benchmarks/memory.py, not measured.
"""


def recompute_row(model: Path, recipe: str, *, gpus: int) -> str:
    """Returns the GB of one GPU at one sample, by what is recomputed, as a row of a table."""
    cells = []
    for policy in ("off", "gemm", "attention", "full"):
        config = load(model, recipe, f"args.checkpoint_activations={policy}")
        need = training_need(config, gpus=gpus, passes=count_passes(config, batch_size=1))
        cells.append(str(_whole(need.cached)))
    return f"| {model.stem}, {recipe}, {gpus} GPUs | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="+", type=Path, help="model files; the whole family when left out")
    parser.add_argument("--recompute", action="store_true", help="off, gemm, attention, full side by side")
    options = parser.parse_args()
    models = options.base or real_models()
    start_single_process()
    if options.recompute:
        for model in models:
            print(recompute_row(model, "sft", gpus=8), recompute_row(model, "lora", gpus=1), sep="\n")
        return
    for model in models:
        print(f"{model.stem}\n{hardware_lines(model)}", flush=True)


if __name__ == "__main__":
    main()

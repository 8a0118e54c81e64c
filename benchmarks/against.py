"""Compares a training step of ours with diffusers' model and CogVideo's: same weights, same inputs, in turn.

    python benchmarks/against.py                                                     # the tiny model
    python benchmarks/against.py --sat ~/CogVideo/sat
    python benchmarks/against.py --base configs/model/cogvideox_5b.yaml --layers 4 --compile     # a GPU

A step is forward, mean squared error, backward, clipping and AdamW in a plain loop; all weights train. `kept`
are the bytes that a forward keeps for its backward, `peak` those that live at most besides weights, gradients
and optimizer states. Ratios are to ours in the same round: median, smallest and largest. On a CPU times are
CPU times. `--sat` is a checkout of zai-org/CogVideo's `sat/`; nothing of it is shipped.

Weights are random; a few layers are enough, since all cost the same. diffusers: `pip install -e ".[test]"`.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel
from torch import Tensor, nn

from benchmarks.gpu_parts.check import Setting, kept_bytes, peak_of
from benchmarks.gpu_parts.random_run import fill
from sat_train.cli.main import run_cli
from sat_train.cli.options import positive
from sat_train.config import RunConfig, load_run_config
from sat_train.config.hardware import find_hardware
from sat_train.config.sat_args import build_sat_args
from sat_train.distributed.processes import start_single_process
from sat_train.errors import LaunchError
from sat_train.models.build import build_dit
from sat_train.models.kernels import chosen_kernels
from sat_train.models.recomputation import set_recomputation
from sat_train.weights.diffusers_config import transformer_config
from sat_train.weights.diffusers_keys import transformer_to_diffusers

TINY = Path(__file__).resolve().parents[1] / "configs/model/cogvideox_tiny.yaml"
SGM = ("sgm", "sgm.modules", "sgm.modules.diffusionmodules")


@dataclass(frozen=True)
class Inputs:
    """What a step takes.

    Args:
        latent: Noised latent, `[b, t, c, h, w]`.
        timesteps: Of each sample.
        text: Text embeddings.
        target: What the output is compared with.
    """

    latent: Tensor
    timesteps: Tensor
    text: Tensor
    target: Tensor


@dataclass(frozen=True)
class Contender:
    """A model with the weights of ours.

    Args:
        name: In the table.
        module: The model.
        predict: Its prediction for inputs.
        kernels: Returns a context for forward and backward.
    """

    name: str
    module: nn.Module
    predict: Callable[[Inputs], Tensor]
    kernels: Callable[[], AbstractContextManager[None]] = nullcontext

    def output(self, inputs: Inputs) -> Tensor:
        """Returns its prediction, fp32."""
        with torch.no_grad(), self.kernels():
            return self.predict(inputs).float()

    def forward(self, inputs: Inputs) -> Tensor:
        """Returns the loss."""
        with self.kernels():
            return self._loss(inputs)

    def forward_backward(self, inputs: Inputs) -> None:
        """Adds the gradients of the loss to those of the weights."""
        with self.kernels():
            self._loss(inputs).backward()

    def _loss(self, inputs: Inputs) -> Tensor:
        """Returns the loss that all share."""
        return F.mse_loss(self.predict(inputs).float(), inputs.target)


@dataclass(frozen=True)
class Row:
    """Figures of one contender.

    Args:
        name: The contender.
        seconds: Of each timed step.
        kept: Bytes kept for the backward.
        peak: Bytes at most besides weights and gradients.
        error: Largest difference of the output from ours, relative to the largest output.
    """

    name: str
    seconds: tuple[float, ...]
    kept: int
    peak: float
    error: float


class RotaryTables(CogVideoXImageToVideoPipeline):
    """diffusers' pipeline, only for the rotary tables that it computes."""

    def __init__(self, transformer: CogVideoXTransformer3DModel) -> None:
        self.transformer = transformer
        self.vae_scale_factor_spatial = 1

    def of(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tables of a latent."""
        frames, _, height, width = latent.shape[1:]
        tables: tuple[Tensor, Tensor] = self._prepare_rotary_positional_embeddings(
            height, width, frames, latent.device
        )
        return tables


def ours(config: RunConfig, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> Contender:
    """Builds ours, with random weights."""
    own = config.args.model_copy(update={"bf16": dtype == torch.bfloat16})
    dit = build_dit(
        config.spec,
        device=device,
        dtype=dtype,
        recompute=own.recompute,
        initialize=False,
    )
    fill(dit, start_single_process())
    set_recomputation(dit, config)
    if compiled:
        dit.compile_blocks()
    return Contender(
        "ours",
        dit,
        lambda given: dit(given.latent, given.timesteps, given.text),
        lambda: chosen_kernels(own, device),
    )


def of_diffusers(config: RunConfig, dit: nn.Module, like: dict[str, Any]) -> Contender:
    """Builds diffusers' model with the weights of ours."""
    model = CogVideoXTransformer3DModel.from_config(transformer_config(config.spec))
    missing, unexpected = model.load_state_dict(transformer_to_diffusers(dit.state_dict()), strict=False)
    assert not unexpected, f"diffusers' model has no {unexpected}"
    assert all("pos_embedding" in name for name in missing), f"ours has no {missing}"
    model.to(**like).train()
    if config.args.recompute != "off":
        model.enable_gradient_checkpointing()
    rotates = model.config.use_rotary_positional_embeddings
    rotary: list[Any] = []

    def predict(given: Inputs) -> Tensor:
        if rotates and not rotary:
            rotary.append(RotaryTables(model).of(given.latent))
        out: Tensor = model(
            hidden_states=given.latent,
            encoder_hidden_states=given.text,
            timestep=given.timesteps,
            image_rotary_emb=rotary[0] if rotates else None,
            return_dict=False,
        )[0]
        return out

    return Contender("diffusers", model, predict)


def of_sat(config: RunConfig, dit: nn.Module, like: dict[str, Any], folder: Path) -> Contender:
    """Builds the model of a checkout of CogVideo's `sat/` with the weights of ours."""
    with _importable(folder), _on_device(like["device"]):
        module = importlib.import_module("dit_video_concat")
        model = module.DiffusionTransformer(**_sat_settings(config, like["dtype"]))
    state = dit.state_dict()
    projection = "mixins.patch_embed.proj.weight"  # a convolution in files of 1.0, here a matrix
    state[projection] = state[projection].flatten(1)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, f"their model has no {unexpected}"
    assert all("embed" in name for name in missing), f"ours has no {missing}"  # tables, and unused words
    model.to(**like).train()
    return Contender("sat", model, lambda given: model(given.latent, given.timesteps, given.text))


def _sat_settings(config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    spec, here = config.spec, "dit_video_concat"
    rotates = spec.positions.target == "Rotary3DPositionEmbedding"
    positions: dict[str, Any] = {"text_length": spec.text_length}
    positions |= {"hidden_size_head": spec.head_width} if rotates else {}
    kind = "Rotary3DPositionEmbeddingMixin" if rotates else "Basic3DPositionEmbeddingMixin"
    args = vars(build_sat_args(config))
    args["checkpoint_activations"] = config.args.recompute != "off"
    return {
        "transformer_args": Namespace(**args),
        "num_frames": (spec.trained_latent[0] - 1) * spec.temporal_compression + 1,
        "time_compressed_rate": spec.temporal_compression,
        "latent_height": spec.trained_latent[1],
        "latent_width": spec.trained_latent[2],
        "patch_size": list(spec.patch),
        "in_channels": spec.in_channels,
        "out_channels": spec.out_channels,
        "hidden_size": spec.width,
        "num_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "elementwise_affine": spec.affine_norms,
        "time_embed_dim": spec.time_width,
        "time_interpolation": spec.interpolation[0],
        "height_interpolation": spec.interpolation[1],
        "width_interpolation": spec.interpolation[2],
        "dtype": {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype],
        "modules": {
            "pos_embed_config": {"target": f"{here}.{kind}", "params": positions},
            "patch_embed_config": {
                "target": f"{here}.ImagePatchEmbeddingMixin",
                "params": {"text_hidden_size": spec.text_width},
            },
            "adaln_layer_config": {"target": f"{here}.AdaLNMixin", "params": {"qk_ln": spec.qk_norm}},
            "final_layer_config": {"target": f"{here}.FinalLayerMixin"},
        },
    }


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Makes `dit_video_concat` importable without what the rest of `sgm` needs: lightning, xformers."""
    if not (folder / "dit_video_concat.py").is_file():
        expected = "CogVideo's folder sat/, with dit_video_concat.py"
        raise LaunchError(f"--sat {folder}: not that folder", expected=expected)
    for name in SGM:
        package = ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    from sat.model.base_model import BaseMixin  # once our own modules have entered SAT's packages

    provided = {
        "sgm.modules.diffusionmodules.openaimodel": {"Timestep": nn.Identity},  # for class labels, unused
        "sat.model.mixins": {"BaseMixin": BaseMixin},  # its own imports every model that SAT ships
    }
    for name, names in provided.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(names)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _on_device(device: torch.device) -> Iterator[None]:
    """Lets their tables, which ask for CUDA, be made on a CPU."""
    if device.type == "cuda":
        yield
        return
    with patch.object(Tensor, "cuda", lambda tensor, *_: tensor):
        yield


def draw_inputs(config: RunConfig, batch_size: int, like: dict[str, Any]) -> Inputs:
    """Draws inputs of the configuration's size."""
    spec, data = config.spec, config.require_data().params
    latent = spec.latent(data.max_num_frames, *data.video_size)
    area = (latent.height, latent.width)
    shape = (batch_size, latent.padded_frames, spec.in_channels, *area)
    torch.manual_seed(0)
    return Inputs(
        latent=torch.randn(shape, **like),
        timesteps=torch.full((batch_size,), 500, device=like["device"]),
        text=torch.randn(batch_size, spec.text_length, spec.text_width, **like),
        target=torch.randn(batch_size, latent.padded_frames, spec.out_channels, *area, device=like["device"]),
    )


def compare(contenders: Sequence[Contender], inputs: Inputs, setting: Setting, *, rounds: int) -> list[Row]:
    """Measures the contenders; the first is the one that the others are compared with."""
    outputs = [each.output(inputs) for each in contenders]
    kept = [kept_bytes(partial(each.forward, inputs)) for each in contenders]
    peaks = [_peak(each, inputs, setting) for each in contenders]
    steps = [_step_of(each, inputs) for each in contenders]
    for step in steps:
        step()  # compiles, and allocates the optimizer's states
    times = [[_seconds(step, setting) for step in steps] for _ in range(rounds)]
    scale = outputs[0].abs().max()
    return [
        Row(each.name, tuple(column), bytes_kept, peak, float((output - outputs[0]).abs().max() / scale))
        for each, column, bytes_kept, peak, output in zip(
            contenders, zip(*times, strict=True), kept, peaks, outputs, strict=True
        )
    ]


def _peak(contender: Contender, inputs: Inputs, setting: Setting) -> float:
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
        for parameter in contender.module.parameters()
        if parameter.requires_grad
    ]
    peak = peak_of(setting, contender.module, lambda: contender.forward_backward(inputs))
    for hook in hooks:
        hook.remove()
    return peak


def _step_of(contender: Contender, inputs: Inputs) -> Callable[[], None]:
    weights = [parameter for parameter in contender.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        contender.forward_backward(inputs)
        torch.nn.utils.clip_grad_norm_(weights, 0.1)
        optimizer.step()

    return step


def _seconds(step: Callable[[], None], setting: Setting) -> float:
    clock = time.perf_counter if setting.on_gpu else time.process_time
    setting.wait()
    start = clock()
    step()
    setting.wait()
    return clock() - start


def table(rows: Sequence[Row]) -> str:
    """Returns the rows with their ratios to the first."""
    lines = [f"{'':<12}{'ms':>9}{'ratio':>8}{'spread':>16}{'kept MB':>10}{'peak MB':>10}{'difference':>13}"]
    for row in rows:
        ratios = [a / b for a, b in zip(row.seconds, rows[0].seconds, strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(
            f"{row.name:<12}{statistics.median(row.seconds) * 1e3:>9.1f}{statistics.median(ratios):>8.2f}"
            f"{spread:>16}{row.kept / 1e6:>10.1f}{row.peak / 1e6:>10.1f}{row.error:>13.1e}"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", nargs="+", default=[str(TINY)], help="a model file")
    parser.add_argument("--sat", type=Path, help="a checkout of CogVideo's sat/")
    parser.add_argument("--layers", type=positive(int, 1000), help="layers to build, else all")
    parser.add_argument("--batch-size", type=positive(int, 1000), default=1)
    parser.add_argument("--rounds", type=positive(int, 1000), default=7, help="timed steps of each")
    parser.add_argument(
        "--recompute",
        choices=("off", "gemm", "attention", "full"),
        default="off",
        help="off, gemm, attention or full; theirs: all or nothing",
    )
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16 on a GPU, else fp32")
    return parser.parse_args()


def main() -> None:
    options = parse()
    mesh = start_single_process("auto")
    words = [f"args.checkpoint_activations={options.recompute}"]
    words += [f"model.network_config.params.num_layers={options.layers}"] if options.layers else []
    config = load_run_config(options.base, words, purpose="check", check_paths=False)
    name = options.dtype or ("bf16" if mesh.device.type == "cuda" else "fp32")
    like = {"device": mesh.device, "dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[name]}
    first = ours(config, **like, compiled=options.compile)
    contenders = [first, of_diffusers(config, first.module, like)]
    if options.sat is not None:
        contenders.append(of_sat(config, first.module, like, options.sat))
    setting = Setting(mesh, find_hardware("h100"), False, Path(tempfile.gettempdir()))
    inputs = draw_inputs(config, options.batch_size, like)
    rows = compare(contenders, inputs, setting, rounds=options.rounds)
    data = config.require_data().params
    tokens = config.spec.tokens(config.spec.latent(data.max_num_frames, *data.video_size))
    print(
        f"{config.spec.layers} layers of {config.spec.width}, {options.batch_size} x {tokens} tokens, {name}"
    )
    print(table(rows))
    flops = options.batch_size * config.spec.training_flops(tokens, trains_base=True)
    print(f"ours: {flops / statistics.median(rows[0].seconds) / 1e9:,.1f} GFLOP/s of model FLOPs")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))

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
from dataclasses import dataclass
from pathlib import Path

from sat_train.cli.main import run_cli
from sat_train.config import RunConfig, load_run_config
from sat_train.distributed.processes import start_single_process
from sat_train.engine.compilation import compiles_on_gpus
from sat_train.planning.counting import count_decoding, count_passes
from sat_train.planning.gpu_memory import (
    CONTEXT_BYTES,
    Weights,
    count_encoders,
    count_states,
    count_weights,
)

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
GB = 1e9


def passes_bytes(config: RunConfig, samples: int) -> float:
    """Returns what a forward and backward pass takes of a GPU, compiled where GPUs compile."""
    return count_passes(config, batch_size=samples, compiled=compiles_on_gpus(config.args)).peak


def training_bytes(config: RunConfig, weights: Weights, *, gpus: int, passes: float) -> float:
    """Returns what one training step takes of a GPU, with a complete cache and no validation videos.

    Args:
        config: Model and recipe; the ZeRO stage is read from it.
        weights: From `count_weights`.
        gpus: Data ranks.
        passes: From `passes_bytes`.
    """
    states = count_states(config, weights, data_ranks=gpus)
    lasting = states.weights + states.gradients + states.optimizer + states.buffers
    return lasting + max(passes, states.update) + CONTEXT_BYTES


def sampling_bytes(config: RunConfig, weights: Weights) -> float:
    """Returns what sampling one video takes: all weights, and denoising or decoding, whichever is more."""
    most = max(count_passes(config, batch_size=2, training=False).peak, count_decoding(config).peak)
    return 2 * weights.transformer + count_encoders(config, weights).gpu + most + CONTEXT_BYTES


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
    weights, lora_weights = count_weights(sft), count_weights(lora)
    sft_passes, lora_passes = (
        [passes_bytes(config, samples) for samples in (1, 2)] for config in (sft, lora)
    )
    one, two = (_gb(training_bytes(sft, weights, gpus=8, passes=passes)) for passes in sft_passes)
    lora_one, lora_two = (
        _gb(training_bytes(lora, lora_weights, gpus=1, passes=passes)) for passes in lora_passes
    )
    return Figures(
        sft_8=(one, two),
        sft_1=_gb(training_bytes(sft, weights, gpus=1, passes=sft_passes[0])),
        lora=(lora_one, lora_two),
        encoders=round(count_encoders(sft, weights).gpu / GB),
        sample=_gb(sampling_bytes(sft, weights)),
    )


def _gb(count: float) -> int:
    return math.ceil(count / GB)


def lora_gb(config: RunConfig) -> int:
    """Returns GB of one GPU for LoRA with one sample, everything cached, rounded up, with the context."""
    return _gb(training_bytes(config, count_weights(config), gpus=1, passes=passes_bytes(config, 1)))


def hardware_lines(model: Path) -> str:
    """Returns what the head of a model file says about GPU memory."""
    need = figures(model)
    lora = need.lora
    return f"""\
# Hardware   SFT on 8 GPUs with ZeRO-2: {need.sft_8[0]} GB each at 1 sample a GPU, {need.sft_8[1]} GB at 2.
#            SFT on 1 GPU: {need.sft_1} GB. LoRA on 1 GPU: {lora[0]} GB at 1 sample, {lora[1]} GB at 2.
#            Without a complete cache, or with validation videos, {need.encoders} GB more: T5 and autoencoder.
#            Where there is more memory, less is recomputed, and steps are faster. Sampling: {need.sample} GB.
#            Computed by benchmarks/memory.py; steps on an H100 took 0.94 to 1.00 of it.
"""


def recompute_row(model: Path, recipe: str, *, gpus: int) -> str:
    """Returns the GB of one GPU at one sample, by what is recomputed, as a row of a table."""
    cells = []
    for policy in ("off", "gemm", "attention", "full"):
        config = load(model, recipe, f"args.checkpoint_activations={policy}")
        passes = count_passes(config, batch_size=1).peak
        need = training_bytes(config, count_weights(config), gpus=gpus, passes=passes)
        cells.append(str(_gb(need)))
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
    raise SystemExit(run_cli(main))

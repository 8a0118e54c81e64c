"""Help texts of the commands that run on several ranks, without slow imports."""

from __future__ import annotations

import os
from collections.abc import Sequence

_LAUNCHERS = {"train": "train_video.py", "sample": "sample_video.py", "precompute": "precompute.py"}
_EXAMPLES = {
    "train": (
        ("sat-train train --base configs/lora.yaml", "the embedded tiny model, on any machine"),
        (
            "sat-train train --base configs/model/cogvideox_5b.yaml configs/lora.yaml \\\n"
            "      args.load=/weights/CogVideoX-5b args.train_data=[/data/clips]",
            "a LoRA for 5B on your own clips",
        ),
        ("sat-train train --base configs/sft.yaml args.resume=auto", "resume the newest run of this name"),
        (
            "torchrun --nproc_per_node 8 launch/train_video.py --base configs/sft.yaml",
            "the same command on 8 GPUs",
        ),
        ("sat-train check --base configs/lora.yaml args.lr=1e-4", "check a configuration without training"),
    ),
    "sample": (
        (
            'sat-train sample --base configs/sample.yaml --prompt "the sun rises over green hills"',
            "the tiny model",
        ),
        (
            'sat-train sample --base configs/sample.yaml --load runs/lora-... --prompt "..."',
            "what a run trained",
        ),
        ("sat-train sample --base configs/sample.yaml --input-file prompts.txt --input-type txt", "many"),
        ('sat-train sample --base configs/sample.yaml --image first.png --prompt "..."', "image to video"),
        (
            "torchrun --nproc_per_node 8 launch/sample_video.py --base configs/sample.yaml ...",
            "prompts divided over 8 GPUs",
        ),
    ),
    "precompute": (
        (
            "sat-train precompute --base configs/lora.yaml data.cache_dir=cache data.params.views=4",
            "the demo",
        ),
        (
            "sat-train precompute --base configs/model/cogvideox_5b.yaml configs/lora.yaml data.cache_dir=c",
            "5B",
        ),
        (
            "torchrun --nproc_per_node 8 launch/precompute.py --base ... data.cache_dir=cache",
            "clips divided over 8 GPUs",
        ),
        (
            "sat-train train --base configs/lora.yaml data.cache_dir=cache data.cache=require",
            "then train from it",
        ),
        ("sat-train cache list --cache-dir cache", "what the cache holds"),
    ),
}
_MAIN_WORDS = {
    "train": (
        *("load", "train_data", "valid_data", "train_iters", "batch_size"),
        *("gradient_accumulation_steps", "lr", "save_interval", "eval_interval", "resume"),
    ),
    "sample": (
        *("load", "prompt", "input_file", "image", "output_dir", "seed"),
        *("sampling_steps", "guidance_scale", "sampling_num_frames", "sampling_image_size"),
    ),
    "precompute": (
        *("load", "train_data", "valid_data", "eval_interval", "train_iters"),
        *("batch_size", "seed", "num_workers", "device", "epochs"),
    ),
}


def wants_help(words: Sequence[str]) -> bool:
    """Returns whether a command line asks for help."""
    return any(word in ("-h", "--help") for word in words)


def print_usage(command: str) -> None:
    """Prints usage, examples, the main settings and where to find the others.

    Args:
        command: `train`, `sample` or `precompute`.

    Ranks: any; rank 0 alone prints.
    """
    if os.environ.get("RANK", "0") == "0":
        print(render_usage(command))


def render_usage(command: str) -> str:
    """Returns the text of `--help`."""
    from sat_train.config.catalog import all_keys

    lines = [
        f"usage: sat-train {command} --base FILE [FILE ...] [key.path=value ...] [--flag value ...]",
        f"       torchrun ... launch/{_LAUNCHERS[command]} (the same words)",
        "",
        "Later files win over earlier ones, and the command line over all files.",
        "--extension NAME (repeatable) loads a Python file, folder or package that registers parts.",
        "",
        "Examples",
    ]
    for example, what in _EXAMPLES[command]:
        lines += [f"  # {what}", f"  {example}"]
    lines += ["", "Main settings (args.NAME=VALUE, or --NAME VALUE)"]
    for name in _MAIN_WORDS[command]:
        lines.append(f"  {name:<29}{all_keys()[f'args.{name}'].description}")
    lines += [
        "",
        "sat-train check --explain args.lr    what one setting does, may hold, and its default",
        "sat-train check --explain args       all settings of a section: args, model, data, deepspeed",
        f"sat-train check {'--base FILE ...':<21}the same words: every fault, or all values with sources",
    ]
    return "\n".join(lines)

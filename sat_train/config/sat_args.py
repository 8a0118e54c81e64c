"""SAT's argument namespace, for SAT's own classes and files. Built only here, and read by nothing else."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sat_train.config.run import RunConfig
from sat_train.files import write_text

# Arguments that SAT's BaseModel reads and CogVideoX never varies.
_FIXED = {
    "vocab_size": 1,
    "max_sequence_length": 64,
    "layernorm_order": "pre",
    "layernorm_epsilon": 1e-6,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "drop_path": 0.0,
    "inner_hidden_size": None,
    "hidden_size_per_attention_head": None,
    "num_multi_query_heads": 0,
    "is_gated_mlp": False,
    "is_rotary_emb": False,
    "is_decoder": False,
    "make_vocab_size_divisible_by": 1,
    "parallel_output": True,
    "skip_init": True,
    "use_gpu_initialization": False,
    "checkpoint_num_layers": 1,
    "checkpoint_skip_layers": 0,
}


def build_sat_args(config: RunConfig) -> argparse.Namespace:
    """Returns the merged files as SAT knows them: one flat namespace with the sections `*_config` inside.

    Args:
        config: The configuration of a run.

    Source: zai-org/CogVideo@7a1af71 `sat/arguments.py` `process_config_to_args`.
    """
    tree = config.shown_tree()
    return argparse.Namespace(
        **_FIXED,
        **tree["args"],
        num_layers=config.spec.layers,
        hidden_size=config.spec.width,
        num_attention_heads=config.spec.heads,
        model_config=tree["model"],
        data_config=tree.get("data"),
        deepspeed_config=tree["deepspeed"],
    )


def write_model_config(config: RunConfig, path: Path) -> None:
    """Writes the namespace as `model_config.json`, which SAT keeps next to `latest`, atomically.

    Ranks: rank 0 only.

    Source: THUDM/SwissArmyTransformer@63dc23a `sat/training/model_io.py` `save_checkpoint`.
    """
    arguments = {"model_class": "DiffusionTransformer", **vars(build_sat_args(config))}
    write_text(path, json.dumps(arguments, indent=2) + "\n")

"""ModelSpec -> the transformer."""

from __future__ import annotations

import torch

from sat_train.config import ArgsConfig, ModelSpec
from sat_train.config.parts.adapter_parts import AdapterConfig
from sat_train.config.parts.record import Recompute
from sat_train.distributed.seeds import derive_seed
from sat_train.models.adapter import add_adapters
from sat_train.models.dit.sat_layers import building
from sat_train.models.dit.transformer import DiffusionTransformer


def build_dit(
    spec: ModelSpec,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    recompute: Recompute = "off",
    inputs_on_host: bool = False,
    seed: int = 0,
    initialize: bool = True,
    with_adapters: bool = True,
) -> DiffusionTransformer:
    """Builds the transformer, with adapters when the model has them.

    Args:
        spec: The numbers of the model.
        device: Where the weights live; `meta` costs neither time nor memory.
        dtype: Dtype of the weights; adapters are fp32.
        recompute: See `DiffusionTransformer`.
        inputs_on_host: See `DiffusionTransformer`.
        seed: Seed of the initial weights.
        initialize: False leaves the transformer's weights unset, for loading over; adapters are always set.
        with_adapters: False leaves the model's adapters out: the weights bring their own.

    Raises:
        ConfigError: An adapter's target matches no layer.

    Ranks: all; each builds its slice.
    """
    dit = DiffusionTransformer(
        spec,
        recompute=recompute,
        inputs_on_host=inputs_on_host,
        device=device,
        dtype=dtype,
        init_seed=seed if initialize else None,
        hook_order=spec.hook_order,
    )
    for name, module in spec.modules.items():
        with building(torch.device(device), dtype):
            torch.manual_seed(derive_seed(seed, f"module {name}"))
            mixin = module.build(spec)
        dit.add_mixin(name, mixin)
    if spec.adapter is not None and with_adapters:
        add_adapters_of(dit, spec.adapter, seed=seed)
    return dit


def add_adapters_of(dit: DiffusionTransformer, adapter: AdapterConfig, *, seed: int) -> None:
    """Adds the adapters that a configuration names.

    Raises:
        ConfigError: A target matches no layer, or a layer is too small for its adapter.
    """
    params = adapter.params
    alpha = params.scale(params.r, params.lora_alpha) * params.r
    add_adapters(dit, adapter.build, rank=params.r, alpha=alpha, targets=params.targets, seed=seed)


def compute_dtype(args: ArgsConfig) -> torch.dtype:
    """Returns the dtype of the transformer's computation, from `args.bf16` and `args.fp16`; else float32."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else torch.float32


def encoder_dtype(args: ArgsConfig) -> torch.dtype:
    """Returns the dtype of the frozen encoders: half precision wherever the transformer uses it."""
    return torch.bfloat16 if args.bf16 or args.fp16 else torch.float32

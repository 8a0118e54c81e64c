"""A second stack of blocks next to the transformer's: a branch, as wide as the base or narrower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sat.mpu import get_model_parallel_world_size
from torch import Tensor, nn

from sat_train.config import NetworkSpec
from sat_train.errors import ConfigError, Fault
from sat_train.models.dit.block import AdaLNLayer
from sat_train.models.dit.context import BlockContext, ForwardContext
from sat_train.models.dit.initialization import initialize_weights
from sat_train.models.dit.sat_layers import build_layers
from sat_train.models.dit.transformer import DiffusionTransformer


class BlockStack(nn.Module):
    """Blocks with the base's code and head width, held by a `Mixin`, in which no module acts.

    Below the stack's own key, weights have the base's keys, so they are sharded as the base's are. New
    weights draw their seed from torch's global generator; gates start at zero, so new blocks are the
    identity.

    Args:
        model: Numbers of the base.
        layers: Blocks.
        heads: Heads, from which the width follows; None: the base's.

    Raises:
        ConfigError: The ranks of the model axis cannot share the heads.
    """

    def __init__(self, model: NetworkSpec, *, layers: int, heads: int | None = None) -> None:
        super().__init__()
        heads, ranks = heads or model.heads, get_model_parallel_world_size()
        if heads % ranks:
            expected = f"a divisor of {heads}, the heads of a branch"
            raise ConfigError([Fault("args.model_parallel_size", str(ranks), expected)])
        self.width = heads * model.head_width
        self.transformer = build_layers(layers, self.width, heads, model.affine_norms)
        del self.transformer.final_layernorm
        self.adaln_layer = AdaLNLayer(
            num_layers=layers,
            hidden_size=self.width,
            head_dim=model.head_width,
            time_embed_dim=model.time_width,
            qk_norm=model.qk_norm,
            elementwise_affine=model.affine_norms,
        )
        self.blocks = self.adaln_layer.blocks(self.transformer.layers, acting=[{}] * layers)
        if torch.get_default_device().type != "meta":
            seed = int(torch.randint(2**62, (), device="cpu"))
            initialize_weights(self, seed=seed, num_layers=layers)

    def copy_from(self, dit: DiffusionTransformer, layers: Sequence[int]) -> None:
        """Copies blocks of the base, one for each block here, without their adapters."""
        for own, index in zip(self.blocks, layers, strict=True):
            for name, module in own.modules().items():
                weights = dit.blocks[index].modules()[name].state_dict()
                module.load_state_dict({key: weights[key] for key in module.state_dict()})

    def run(
        self, hidden_bld: Tensor, forward: ForwardContext, context: BlockContext | None = None
    ) -> dict[int, Tensor]:
        """Runs the blocks, compiled and checkpointed as the base's are.

        Args:
            hidden_bld: Tokens, `[b, l, width]`.
            forward: The forward.
            context: Context of these tokens; None: they have the positions of the base's.

        Returns:
            The state after each block, `[b, l, width]`.
        """
        context, states = context or forward.block, {}
        for block in self.blocks:
            hidden_bld = states[block.index] = forward.dit.run_block(block, hidden_bld, context)
        return states

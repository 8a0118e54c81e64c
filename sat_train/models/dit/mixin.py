"""The base class of network modules: weights next to the transformer's, and the hooks at which they act."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from sat.model.base_model import BaseMixin
from torch import Tensor, nn

if TYPE_CHECKING:
    from sat_train.models.dit.block import DitBlock
    from sat_train.models.dit.context import BlockContext, Extras, ForwardContext
    from sat_train.models.dit.embedding import PatchGrid

Step = Callable[..., Tensor]


class Mixin(BaseMixin):
    """A network module: its weights, and the hooks where it acts. Override what you need.

    Hooks are of three sorts:

    * *Around*: SAT's own. They receive the step that they wrap as `old_impl`. Where two modules wrap one step
      of one block, `hook_order` names the outermost.
    * *After*: `after_block` returns a tensor that is added to a block's output. Sums need no order.
    * *Between*: `time_features`, `before_blocks` and `tap` run once a forward, outside of what is compiled
      and recomputed. They may keep state; hooks inside a block may not, because it may run twice.

    Weights must be in modules that are called through `forward`: there ZeRO-3 gathers them. A hook makes the
    same calls for every sample (multiply by a mask), or ranks wait for each other forever.

    Args:
        params: The part's parameter record.
        model: The model's description.

    Attributes:
        name: Its name in the model, `mixins.NAME` in the state dict.
        per_block: By block index, as text, the mixin's module in that block; in-block hooks receive it as
            `part`, and run in these blocks only. None: in all blocks, without a part. One compiled graph then
            serves all blocks, while a list indexed by `block.index` compiles one for each.
        tensor_parallel: `replicated`: every rank of the model axis has the same weights, whose gradients are
            complete except in `attention_fn`, which sees a rank's own heads. `sharded`: the module sees to it
            itself. `refused`.
        starts_as_base: With new weights the model computes what its base does, which is checked at the start
            of a run. False: the module is meant to change that at once.
    """

    tensor_parallel: ClassVar[Literal["replicated", "sharded", "refused"]] = "replicated"
    starts_as_base: bool = True

    def __init__(self, params: Any = None, model: Any = None) -> None:
        super().__init__()
        self.params, self.model, self.name = params, model, ""
        self.per_block: nn.ModuleDict | None = None

    def acts_at(self, hook: str, block: int | None = None) -> bool:
        """Returns whether the mixin overrides a hook; with a block, whether it acts in that block."""
        here = block is None or self.per_block is None or str(block) in self.per_block
        return here and getattr(type(self), hook) is not getattr(Mixin, hook)

    def part(self, block: int) -> nn.Module | None:
        """Returns the mixin's module in a block."""
        return None if self.per_block is None else self.per_block[str(block)]

    def reinit(self, dit: nn.Module | None = None) -> None:
        """SAT: copies or zeroes weights, after loading weights that had none for this mixin."""

    # Between: once a forward

    def time_features(self, forward: ForwardContext) -> Tensor | None:
        """Returns an addition to the time features, `[b, time_embed_dim]`; `forward.block` is not set yet.

        One of `[b, frames, time_embed_dim]` modulates each patch of frames of the video alone: `frames` of
        `forward.dit.patch_grid(forward.latent_btchw)`.
        """

    def before_blocks(self, hidden_bld: Tensor, forward: ForwardContext) -> Extras | None:
        """Reads the embedded tokens; returns named tensors for `context.extras`.

        Args:
            hidden_bld: Embedded tokens, `[b, l, d]`.
            forward: The forward.

        Returns:
            By name, a tensor for all blocks, or `{block index: tensor}`, of which each block sees its own.
            Dimension 0 is the batch.
        """

    def tap(self, hidden_bld: Tensor, block: DitBlock, forward: ForwardContext) -> None:
        """Reads the output of each block, once: `forward.outputs[name] = ...` hands a tensor to the loss.

        Runs only where the caller asks for outputs.
        """

    # After and around: inside a block

    def after_block(self, x_bld: Tensor, *, part: Any, block: DitBlock, context: BlockContext) -> Tensor:
        """Returns an addition to the output of a block, `[b, l, d]`. All modules see the same output."""
        return torch.zeros_like(x_bld)

    def layer_forward(
        self, x_bld: Tensor, *, part: Any, block: DitBlock, context: BlockContext, old_impl: Step
    ) -> Tensor:
        """Wraps a whole block, `[b, l, d]` to `[b, l, d]`."""
        return old_impl(x_bld, block=block, context=context)

    def attention_forward(
        self, x_bld: Tensor, *, part: Any, block: DitBlock, context: BlockContext, old_impl: Step
    ) -> Tensor:
        """Wraps attention: modulated tokens before q, k and v, to the result before its gate."""
        return old_impl(x_bld, block=block, context=context)

    def attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        part: Any,
        block: DitBlock,
        context: BlockContext,
        old_impl: Step,
    ) -> Tensor:
        """Wraps the attention function, `[b, n, l, k]` of this rank's heads, normalised and rotated."""
        return old_impl(query, key, value, block=block, context=context)

    def mlp_forward(
        self, x_bld: Tensor, *, part: Any, block: DitBlock, context: BlockContext, old_impl: Step
    ) -> Tensor:
        """Wraps the MLP: modulated tokens, to the result before its gate."""
        return old_impl(x_bld, block=block, context=context)

    # Around: once a forward

    def word_embedding_forward(
        self, latent_btchw: Tensor, text_bld: Tensor, *, forward: ForwardContext, old_impl: Step
    ) -> Tensor:
        """Wraps the embedding of latent and text, to `[b, l, d]`."""
        return old_impl(latent_btchw, text_bld)

    def position_embedding_forward(
        self,
        grid: PatchGrid,
        text_length: int,
        *,
        forward: ForwardContext,
        old_impl: Callable[..., Tensor | None],
    ) -> Tensor | None:
        """Wraps the positions that are added to the tokens, `[1, l, d]`; None adds nothing."""
        return old_impl(grid, text_length)

    def final_forward(
        self, video_bld: Tensor, emb_bd: Tensor, grid: PatchGrid, *, forward: ForwardContext, old_impl: Step
    ) -> Tensor:
        """Wraps the final layer: normalised video tokens and time features, to `[b, t, c, h, w]`."""
        return old_impl(video_bld, emb_bd, grid)

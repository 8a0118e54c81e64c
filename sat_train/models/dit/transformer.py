"""The CogVideoX diffusion transformer: SAT's layers, mixins and keys, and our own loop over the blocks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sat.model.base_model import BaseModel, replacable
from sat.model.transformer import BaseTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sat_train.models.dit.adaln import AdaLNLayer
from sat_train.models.dit.embedding import FinalLayer, PatchEmbed, timestep_features
from sat_train.models.dit.grid import Block, BlockContext, PatchGrid
from sat_train.models.dit.initialization import initialize_weights
from sat_train.models.dit.positions import RotaryPositions, SincosPositions

# what SAT's transformer gives its layers, and diffusers all of them
_NORM_EPS = 1e-5


class DiffusionTransformer(BaseModel):
    """Predicts v from a noised latent, a timestep and a text: CogVideoX 1.0 and 1.5, T2V and I2V.

    Args:
        num_layers: Blocks.
        hidden_size: Model width.
        num_attention_heads: Heads; their width must be divisible by 16.
        in_channels: Channels of the latent, plus those of the image condition (I2V).
        out_channels: Channels of the prediction.
        patch_size: (frames, height, width) of a patch: (1, 2, 2) is 1.0, (2, 2, 2) is 1.5.
        latent_size: (frames, height, width) of the latent in pre-training: what position tables are made for.
        text_hidden_size: Width of the text embeddings.
        text_length: Text tokens that position tables leave room for.
        time_embed_dim: Width of the time features.
        positions: `sincos` (2B), `rotary` (5B, 1.5) or `rotary_learned` (5B-I2V).
        interpolation: Positions along (t, h, w) are divided by these; 2B has (1, 1.875, 1.875).
        rotary_theta: Base of the rotary frequencies.
        ofs_embed_dim: Width of the `ofs` features (1.5-I2V), equal to `time_embed_dim`; None without.
        qk_norm: Normalise queries and keys.
        elementwise_affine: LayerNorms have weights.
        size_policy: What a position table does at other sizes: `refuse` or `interpolate`.
        activation_checkpointing: Keep only each block's input and compute the rest again in the backward.
        device: Where parameters live; `meta` costs neither time nor memory.
        dtype: Dtype of parameters and of computation.
        init_seed: Seed of the initial weights, the same numbers on any device and mesh. None leaves them as
            the memory was, for loading over. Position tables are always filled.

    Ranks: builds this rank's slice when `sat.mpu` has a model axis; all of the axis call `forward` together.

    Source: zai-org/CogVideo@7a1af71 `sat/dit_video_concat.py`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        num_attention_heads: int,
        in_channels: int,
        out_channels: int,
        patch_size: tuple[int, int, int],
        latent_size: tuple[int, int, int],
        text_hidden_size: int,
        text_length: int,
        time_embed_dim: int,
        positions: str,
        interpolation: tuple[float, float, float] = (1.0, 1.0, 1.0),
        rotary_theta: float = 10000.0,
        ofs_embed_dim: int | None = None,
        qk_norm: bool = True,
        elementwise_affine: bool = True,
        size_policy: str = "refuse",
        activation_checkpointing: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        init_seed: int | None = 0,
    ) -> None:
        base = PatchGrid(*(size // patch for size, patch in zip(latent_size, patch_size, strict=True)))
        with _building(torch.device(device), dtype):
            layers = _build_layers(num_layers, hidden_size, num_attention_heads, elementwise_affine)
            super().__init__(None, transformer=layers)
            self.hidden_size, self.in_channels, self.out_channels = hidden_size, in_channels, out_channels
            self.patch_size, self.text_length, self.ofs_embed_dim = patch_size, text_length, ofs_embed_dim
            self.head_dim = hidden_size // num_attention_heads
            self.activation_checkpointing = activation_checkpointing
            self._run_block = self._forward_block
            self.time_embed = _two_layers(hidden_size, time_embed_dim)
            if ofs_embed_dim is not None:
                assert ofs_embed_dim == time_embed_dim, "ofs features are added to the time features"
                self.ofs_embed = _two_layers(ofs_embed_dim, ofs_embed_dim)
            self._add_positions(positions, base, interpolation, rotary_theta, size_policy)
            patch_embed = PatchEmbed(
                in_channels=in_channels,
                hidden_size=hidden_size,
                patch_size=patch_size,
                text_hidden_size=text_hidden_size,
            )
            self.add_mixin("patch_embed", patch_embed)
            self._add_modulation(num_layers, time_embed_dim, qk_norm, elementwise_affine)
        if init_seed is not None and torch.device(device).type != "meta":
            initialize_weights(self, seed=init_seed, num_layers=num_layers)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.time_embed.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, which inputs are cast to."""
        return next(self.time_embed.parameters()).dtype

    def forward(
        self,
        latent_btchw: Tensor,
        timesteps_b: Tensor,
        text_bld: Tensor,
        image_latent_btchw: Tensor | None = None,
        ofs_b: Tensor | None = None,
    ) -> Tensor:
        """Predicts v.

        Args:
            latent_btchw: Noised latent, `[b, t, c, h, w]`; t, h, w divisible by the patch size.
            timesteps_b: Discrete timesteps, `[b]`.
            text_bld: Text embeddings, `[b, l, text_hidden_size]`.
            image_latent_btchw: Latent of the image condition, stood beside the noised one on channels (I2V).
            ofs_b: `ofs` values, `[b]` (1.5-I2V).

        Returns:
            `[b, t, out_channels, h, w]` in the dtype of the weights.

        Raises:
            ConfigError: A position table refuses this size.
        """
        if image_latent_btchw is not None:
            latent_btchw = torch.cat([latent_btchw, image_latent_btchw.to(latent_btchw)], dim=2)
        grid, text_length = self.patch_grid(latent_btchw), text_bld.shape[1]
        hidden_bld = self.hooks["word_embedding_forward"](
            latent_btchw.to(self.dtype), text_bld.to(self.dtype)
        )
        positions = self.hooks["position_embedding_forward"](grid, text_length)
        if positions is not None:
            hidden_bld = hidden_bld + positions.to(hidden_bld.dtype)
        context = self._block_context(self.time_features(timesteps_b, ofs_b), grid, text_length)
        for block in self.mixins["adaln_layer"].blocks():
            hidden_bld = self._run_block(hidden_bld, block, context)
        video_bld = self.transformer.final_layernorm(hidden_bld[:, text_length:])
        v_btchw: Tensor = self.hooks["final_forward"](video_bld, context.emb_bd, grid)
        return v_btchw

    def patch_grid(self, latent_btchw: Tensor) -> PatchGrid:
        """Returns the number of patches of a latent along each axis."""
        frames, channels, *area = latent_btchw.shape[1:]
        assert channels == self.in_channels, f"{channels} latent channels, the model takes {self.in_channels}"
        sizes = tuple(zip((frames, *area), self.patch_size, strict=True))
        assert all(size % patch == 0 for size, patch in sizes), (
            f"latent {(frames, *area)}, patch {self.patch_size}"
        )
        return PatchGrid(*(size // patch for size, patch in sizes))

    def time_features(self, timesteps_b: Tensor, ofs_b: Tensor | None = None) -> Tensor:
        """Returns what modulates every block, `[b, time_embed_dim]`; sines and cosines are fp32."""
        assert (ofs_b is None) == (self.ofs_embed_dim is None), "ofs goes with models that embed it"
        emb_bd: Tensor = self.time_embed(timestep_features(timesteps_b, self.hidden_size).to(self.dtype))
        if ofs_b is not None and self.ofs_embed_dim is not None:
            emb_bd = emb_bd + self.ofs_embed(timestep_features(ofs_b, self.ofs_embed_dim).to(self.dtype))
        return emb_bd

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Compiles the block, once for all layers, for each size and mode. Call it before DeepSpeed."""
        # training and sampling of a dozen sizes; past the limit torch goes back to eager without a word
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self._run_block = torch.compile(self._forward_block, backend=backend, dynamic=False)

    def derived_keys(self) -> frozenset[str]:
        """Returns the keys of the state dict that a formula gives: weights from elsewhere may lack them."""
        return frozenset(f"mixins.{name}" for name, _ in self.mixins.named_buffers())

    def collect_hooks_(self) -> dict[str, object]:
        """SAT: asks the model and its mixins for hooks; the transformer's layers share what is found."""
        hooks: dict[str, object] = super().collect_hooks_()
        if hasattr(self, "transformer"):
            self.transformer.hooks.clear()
            self.transformer.hooks.update(hooks)
        return hooks

    @replacable  # type: ignore[untyped-decorator]  # SAT has no types
    def attention_fn(
        self, query: Tensor, key: Tensor, value: Tensor, *, block: Block, context: BlockContext
    ) -> Tensor:
        """SAT hook: attention of all tokens to all tokens, `[b, n, l, k]`."""
        return F.scaled_dot_product_attention(query, key, value)

    @replacable  # type: ignore[untyped-decorator]  # SAT has no types
    def mlp_forward(self, x_bld: Tensor, *, block: Block) -> Tensor:
        """SAT hook: `[b, l, d]` to `[b, l, d]`."""
        mlp = block.layer.mlp
        y_bld: Tensor = mlp.dense_4h_to_h(F.gelu(mlp.dense_h_to_4h(x_bld), approximate="tanh"))
        return y_bld

    def _add_positions(
        self,
        kind: str,
        base: PatchGrid,
        interpolation: tuple[float, float, float],
        theta: float,
        size_policy: str,
    ) -> None:
        assert kind in ("sincos", "rotary", "rotary_learned"), kind
        if kind == "sincos":
            positions = SincosPositions(
                base=base,
                dim=self.hidden_size,
                text_length=self.text_length,
                interpolation=interpolation,
                size_policy=size_policy,
            )
        else:
            positions = RotaryPositions(
                base=base,
                head_dim=self.head_dim,
                fit_to_base=self.patch_size[0] == 1,
                interpolation=interpolation,
                theta=theta,
                learned_dim=self.hidden_size if kind == "rotary_learned" else None,
                text_length=self.text_length,
                size_policy=size_policy,
            )
        self.add_mixin("pos_embed", positions)

    def _add_modulation(
        self, num_layers: int, time_embed_dim: int, qk_norm: bool, elementwise_affine: bool
    ) -> None:
        adaln_layer = AdaLNLayer(
            num_layers=num_layers,
            hidden_size=self.hidden_size,
            head_dim=self.head_dim,
            time_embed_dim=time_embed_dim,
            qk_norm=qk_norm,
            elementwise_affine=elementwise_affine,
        )
        final_layer = FinalLayer(
            hidden_size=self.hidden_size,
            time_embed_dim=time_embed_dim,
            patch_size=self.patch_size,
            out_channels=self.out_channels,
            elementwise_affine=elementwise_affine,
            eps=_NORM_EPS,
        )
        self.add_mixin("adaln_layer", adaln_layer)
        self.add_mixin("final_layer", final_layer)

    def _forward_block(self, hidden_bld: Tensor, block: Block, context: BlockContext) -> Tensor:
        layer_forward = self.hooks["layer_forward"]
        if self.activation_checkpointing and torch.is_grad_enabled():
            hidden_bld = checkpoint(layer_forward, hidden_bld, block, context, use_reentrant=False)
        else:
            hidden_bld = layer_forward(hidden_bld, block, context)
        return hidden_bld

    def _block_context(self, emb_bd: Tensor, grid: PatchGrid, text_length: int) -> BlockContext:
        is_text_l1 = torch.arange(text_length + grid.tokens, device=emb_bd.device)[:, None] < text_length
        pos_embed = self.mixins["pos_embed"]
        if not isinstance(pos_embed, RotaryPositions):
            return BlockContext(emb_bd, is_text_l1, None, None)
        return BlockContext(emb_bd, is_text_l1, *pos_embed.rotary_tables(grid, text_length, emb_bd.device))


def _two_layers(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features)
    )


def _build_layers(
    num_layers: int, hidden_size: int, num_attention_heads: int, elementwise_affine: bool
) -> BaseTransformer:
    """Builds SAT's transformer without the word and position embeddings that a video has no use for.

    SAT builds it on the CPU unless told otherwise; its linear layers ignore torch's default device and dtype.
    """
    transformer = BaseTransformer(
        num_layers=num_layers,
        vocab_size=1,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        max_sequence_length=1,
        layernorm_epsilon=_NORM_EPS,
        layernorm=functools.partial(nn.LayerNorm, elementwise_affine=elementwise_affine),
        skip_init=True,
        params_dtype=torch.get_default_dtype(),
        device=torch.get_default_device(),
    )
    del transformer.word_embeddings, transformer.position_embeddings
    return transformer


@contextlib.contextmanager
def _building(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Makes parameters on a device and in a dtype, and gives the global generators back as they were."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            yield
    finally:
        torch.set_default_dtype(before)

"""The CogVideoX diffusion transformer: SAT's layers, mixins and keys, and our own loop over the blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from sat.model.base_model import BaseMixin, BaseModel
from torch import Tensor, nn

from sat_train.config import NetworkSpec
from sat_train.config.parts.record import Recompute
from sat_train.models.dit.block import AdaLNLayer, DitBlock
from sat_train.models.dit.context import BlockContext, ForwardContext, cast_extras
from sat_train.models.dit.embedding import FinalLayer, PatchEmbed, PatchGrid, timestep_features
from sat_train.models.dit.frame_levels import (
    AppendedFrames,
    add_time_features,
    append_frames,
    concatenated,
    timestep_rows,
)
from sat_train.models.dit.hooks import OWNERS, HookOrder, Hooks, check_mixin
from sat_train.models.dit.host_inputs import HostInputs
from sat_train.models.dit.initialization import initialize_weights
from sat_train.models.dit.mixin import Mixin
from sat_train.models.dit.positions import PositionEmbedding
from sat_train.models.dit.recompute import recompute_elementwise, recomputing
from sat_train.models.dit.sat_layers import NORM_EPS, build_layers, building


class DiffusionTransformer(BaseModel):
    """Predicts v from a noised latent, a timestep and a text: CogVideoX 1.0 and 1.5, T2V and I2V.

    Args:
        spec: Its numbers; a `ModelSpec` works too.
        hook_order: By hook, names of the modules around it, outermost first; required where there are
            several.
        recompute: What the backward of a block computes again, see `recomputing`; an attribute `recompute` of
            its layer comes first.
        inputs_on_host: What recomputed blocks keep of their inputs lies in host memory.
        device: Where parameters live; `meta` costs neither time nor memory.
        dtype: Dtype of parameters and of computation.
        init_seed: Seed of the initial weights, the same numbers on any device and mesh. None leaves them
            uninitialized, for loading over. Position tables are always filled.

    Ranks: builds this rank's slice when `sat.mpu` has a model axis; all of the axis call `forward` together.

    Source: zai-org/CogVideo@7a1af71 `sat/dit_video_concat.py`.
    """

    def __init__(
        self,
        spec: NetworkSpec,
        *,
        hook_order: HookOrder | None = None,
        recompute: Recompute = "off",
        inputs_on_host: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        init_seed: int | None = 0,
    ) -> None:
        assert spec.ofs_width in (None, spec.time_width), "ofs features are added to the time features"
        with building(torch.device(device), dtype):
            layers = build_layers(spec.layers, spec.width, spec.heads, spec.affine_norms)
            super().__init__(None, transformer=layers)
            self.spec = spec
            self.hook_order: HookOrder = hook_order or {}
            self.recompute = recompute
            self._run, self._host_inputs = recomputing, HostInputs() if inputs_on_host else None
            self.time_embed = _two_layers(spec.width, spec.time_width)
            if spec.ofs_width is not None:
                self.ofs_embed = _two_layers(spec.ofs_width, spec.ofs_width)
            super().add_mixin("pos_embed", spec.positions.build(spec))
            self._add_layers()
        if init_seed is not None and torch.device(device).type != "meta":
            initialize_weights(self, seed=init_seed, num_layers=spec.layers)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
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
        *,
        channels_btchw: Tensor | None = None,
        frames_bfchw: Tensor | None = None,
        frame_index_f: Tensor | None = None,
        frame_level_bf: Tensor | None = None,
        levels_bt: Tensor | None = None,
        extras: Mapping[str, Tensor] | None = None,
        return_outputs: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Predicts v.

        Args:
            latent_btchw: Noised latent; t, h, w divisible by the patch size.
            timesteps_b: Discrete timesteps.
            text_bld: Text embeddings, `[b, l, text_hidden_size]`.
            image_latent_btchw: Latent of the image condition (I2V), next to the noised one on channels.
            ofs_b: `ofs` values (1.5-I2V).
            channels_btchw: Further channels.
            frames_bfchw: Latent frames behind the video in time, at `frame_index_f`, see `append_frames`.
            frame_level_bf: Their timesteps; None: clean.
            levels_bt: Timesteps of latent frames, -1 where clean; None: the samples', which text always has.
            extras: Named tensors for modules, batch first, see `cast_extras`.
            return_outputs: Run the modules' `tap`, and return their outputs for the loss as well.

        Returns:
            v, `[b, t, out_channels, h, w]` in the dtype of the weights; with `return_outputs` (v, outputs).

        Raises:
            ConfigError: A position table refuses this size.
            SatTrainError: Appended frames do not fit the model or its positions.
        """
        latent_btchw = concatenated(latent_btchw, image_latent_btchw, channels_btchw).to(self.dtype)
        frames = append_frames(frames_bfchw, frame_index_f, frame_level_bf, latent_btchw, self.spec.patch[0])
        text_bld, inputs = text_bld.to(self.dtype), cast_extras(extras or {}, latent_btchw)
        forward = ForwardContext(self, latent_btchw, text_bld, timesteps_b, ofs_b, levels_bt, frames, inputs)
        v_btchw = self._predict(forward, taps=return_outputs)
        return (v_btchw, forward.outputs) if return_outputs else v_btchw

    def _predict(self, forward: ForwardContext, *, taps: bool) -> Tensor:
        latent_btchw, text_bld = forward.latent_btchw, forward.text_bld
        hidden_bld = self.embed(latent_btchw, text_bld, forward)
        emb_bd = self.time_features(forward.timesteps_b, forward.ofs_b, forward)
        forward.block_context = context = self.block_context(emb_bd, latent_btchw, text_bld, forward.appended)
        self._run_before_blocks(hidden_bld, forward)
        for block in self.blocks:
            hidden_bld = self.run_block(block, hidden_bld, context.for_block(block.index, forward.extras))
            for mixin in self.hooks.between["tap"] if taps else ():
                mixin.tap(hidden_bld, block, forward)
        end = context.text_length + context.grid.tokens  # appended frames are not predicted
        video_bld = self.transformer.final_layernorm(hidden_bld[:, context.text_length : end])
        final_forward = self._step("final_forward", forward)
        v_btchw: Tensor = final_forward(video_bld, context.video_features, context.grid)
        return v_btchw

    def patch_grid(self, latent_btchw: Tensor) -> PatchGrid:
        """Returns the number of patches of a latent along each axis."""
        frames, channels, *area = latent_btchw.shape[1:]
        assert channels == self.spec.in_channels, (
            f"{channels} latent channels, the model takes {self.spec.in_channels}"
        )
        sizes = tuple(zip((frames, *area), self.spec.patch, strict=True))
        assert all(size % patch == 0 for size, patch in sizes), (
            f"latent {(frames, *area)}, patch {self.spec.patch}"
        )
        return PatchGrid(*(size // patch for size, patch in sizes))

    def embed(self, latent_btchw: Tensor, text_bld: Tensor, forward: ForwardContext | None = None) -> Tensor:
        """Embeds text and patches with their positions.

        Args:
            latent_btchw: All channels, `[b, t, c, h, w]`.
            text_bld: Text embeddings.
            forward: The forward whose modules act; None: none do.

        Returns:
            Tokens, `[b, l, d]`.
        """
        appended = None if forward is None else forward.appended
        frames_btchw = (
            latent_btchw if appended is None else torch.cat([latent_btchw, appended.latent_bfchw], dim=1)
        )
        hidden_bld: Tensor = self._step("word_embedding_forward", forward)(frames_btchw, text_bld)
        grid, text_length = self.patch_grid(latent_btchw), text_bld.shape[1]
        positions = self._step("position_embedding_forward", forward)(grid, text_length)
        if appended is None:
            return _added(hidden_bld, positions)
        own, others = hidden_bld.tensor_split((text_length + grid.tokens,), dim=1)
        of_others = self._positions.frame_positions(grid, appended.positions)
        return torch.cat([_added(own, positions), _added(others, of_others)], dim=1)

    def time_features(
        self, timesteps_b: Tensor, ofs_b: Tensor | None = None, forward: ForwardContext | None = None
    ) -> Tensor:
        """Returns the features that modulate blocks, `BlockContext.emb_bd`; sines and cosines are fp32.

        Args:
            timesteps_b: The samples' timesteps.
            ofs_b: `ofs` values.
            forward: The forward whose modules and frames have features of their own; None: none have.
        """
        assert (ofs_b is None) == (self.spec.ofs_width is None), "ofs is for models that embed it"
        steps = timesteps_b if forward is None else self._timestep_rows(forward)
        emb_bd: Tensor = self.time_embed(timestep_features(steps, self.spec.width).to(self.dtype))
        if ofs_b is not None and self.spec.ofs_width is not None:
            ofs_bd = self.ofs_embed(timestep_features(ofs_b, self.spec.ofs_width).to(self.dtype))
            emb_bd = emb_bd + (ofs_bd if emb_bd.dim() == 2 else ofs_bd[:, None])
        return emb_bd if forward is None else self._add_modules_features(emb_bd, forward)

    def _add_modules_features(self, emb_bd: Tensor, forward: ForwardContext) -> Tensor:
        for mixin in self.hooks.between["time_features"]:
            added = mixin.time_features(forward)
            if added is not None:
                frames = self.patch_grid(forward.latent_btchw).frames
                appended = len(forward.appended.positions) if forward.appended is not None else 0
                emb_bd = add_time_features(emb_bd, added, frames=frames, appended=appended)
        return emb_bd

    def _timestep_rows(self, forward: ForwardContext) -> Tensor:
        return timestep_rows(
            forward.timesteps_b,
            forward.levels_bt,
            forward.appended,
            frames=self.patch_grid(forward.latent_btchw).frames,
            patch_frames=self.spec.patch[0],
        )

    @property
    def _positions(self) -> PositionEmbedding:
        positions = self.mixins["pos_embed"]
        assert isinstance(positions, PositionEmbedding), "the builder of a position embedding returns one"
        return positions

    def block_context(
        self,
        emb_bd: Tensor,
        latent_btchw: Tensor,
        text_bld: Tensor,
        appended: AppendedFrames | None = None,
    ) -> BlockContext:
        """Returns the inputs of blocks besides their tokens, without extras."""
        grid, text_length, device = self.patch_grid(latent_btchw), text_bld.shape[1], emb_bd.device
        rotation_lk2 = self._positions.rotation(grid, text_length, device)
        if appended is None:
            return BlockContext(emb_bd, rotation_lk2, grid, text_length)
        of_frames = self._positions.frame_rotation(grid, appended.positions, device)
        if rotation_lk2 is not None:
            assert of_frames is not None, "positions that rotate the video rotate appended frames"
            rotation_lk2 = torch.cat([rotation_lk2, of_frames])
        count = len(appended.positions) * grid.height * grid.width
        return BlockContext(emb_bd, rotation_lk2, grid, text_length, count)

    def run_block(self, block: DitBlock, hidden_bld: Tensor, context: BlockContext) -> Tensor:
        """Runs a block, or one of a `BlockStack`: compiled and recomputed as the model is."""
        recompute = block.recompute or self.recompute  # outside of the graph, which a policy's blocks share
        inputs = self._host_inputs if recompute != "off" and torch.is_grad_enabled() else None
        with nullcontext() if inputs is None else inputs.around():
            return self._run(block, hidden_bld, context, recompute=recompute)

    def compile_blocks(self, *, backend: str = "inductor") -> None:
        """Compiles the block, once for all layers, for each size and mode. Call it before DeepSpeed."""
        # training and sampling of a dozen sizes; past the limit torch falls back to eager silently
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        recompute_elementwise()
        self._run = torch.compile(recomputing, backend=backend, dynamic=False)

    def add_mixin(self, name: str, new_mixin: BaseMixin, reinit: bool = False) -> None:
        """Adds a module under `mixins.NAME`, as SAT's method does. The order of additions has no effect.

        Raises:
            ConfigError: The blocks cannot run it, or `hook_order` does not give its position.
        """
        check_mixin(name, new_mixin, num_layers=len(self.transformer.layers))
        if isinstance(new_mixin, Mixin):
            new_mixin.name = name
        super().add_mixin(name, new_mixin, reinit)

    def derived_keys(self) -> frozenset[str]:
        """Returns keys of the state dict that a formula computes: weights from elsewhere may lack them."""
        return frozenset(f"mixins.{name}" for name, _ in self.mixins.named_buffers())

    def modules_of_its_own(self) -> dict[str, Mixin]:
        """Returns the network modules added to the base, by the prefix of their keys."""
        own = self.mixins.items()
        return {f"mixins.{name}.": mixin for name, mixin in own if isinstance(mixin, Mixin)}

    def added_prefixes(self) -> tuple[str, ...]:
        """Returns prefixes of keys that the base's weights lack: of modules, and of a widened input."""
        widened = ("mixins.patch_embed.proj.",) if self.spec.condition_channels else ()
        return (*self.modules_of_its_own(), *widened)

    @contextmanager
    def without_modules(self, names: Collection[str]) -> Iterator[None]:
        """Computes without some of its network modules inside the body; their weights stay."""
        kept = {name: mixin for name, mixin in self.mixins.items() if name not in names}
        self._assign_hooks(kept)
        try:
            yield
        finally:
            self.collect_hooks_()

    def collect_hooks_(self) -> None:
        """Assigns modules to hooks and rebuilds the blocks; SAT calls it after each change of the mixins."""
        if "adaln_layer" not in self.mixins:  # SAT also calls this while the base is being built
            return
        self._assign_hooks(self.mixins)

    def _assign_hooks(self, mixins: Mapping[str, nn.Module]) -> None:
        layers, adaln_layer = self.transformer.layers, self.mixins["adaln_layer"]
        assert isinstance(adaln_layer, AdaLNLayer), "the base's own"
        self.hooks = Hooks(mixins, order=self.hook_order, num_layers=len(layers))
        self.hook_origins = self.hooks.origins()
        self.blocks = adaln_layer.blocks(layers, acting=self.hooks.in_block)

    def _step(self, hook: str, forward: ForwardContext | None) -> Callable[..., Any]:
        step = getattr(self.mixins[OWNERS[hook]], hook)
        return step if forward is None else self.hooks.around(hook, step, forward)

    def _run_before_blocks(self, hidden_bld: Tensor, forward: ForwardContext) -> None:
        """Adds the tensors that modules return to the extras; each module sees those of conditions alone."""
        modules = self.hooks.between["before_blocks"]
        for extras in [mixin.before_blocks(hidden_bld, forward) or {} for mixin in modules]:
            twice = sorted(extras.keys() & forward.extras.keys())
            assert not twice, f"extras {', '.join(twice)} are set twice: name them after the module"
            forward.extras.update(extras)

    def _add_layers(self) -> None:
        spec = self.spec
        patch_embed = PatchEmbed(
            in_channels=spec.in_channels,
            hidden_size=spec.width,
            patch_size=spec.patch,
            text_hidden_size=spec.text_width,
        )
        adaln_layer = AdaLNLayer(
            num_layers=spec.layers,
            hidden_size=spec.width,
            head_dim=spec.head_width,
            time_embed_dim=spec.time_width,
            qk_norm=spec.qk_norm,
            elementwise_affine=spec.affine_norms,
        )
        final_layer = FinalLayer(
            hidden_size=spec.width,
            time_embed_dim=spec.time_width,
            patch_size=spec.patch,
            out_channels=spec.out_channels,
            elementwise_affine=spec.affine_norms,
            eps=NORM_EPS,
        )
        super().add_mixin("patch_embed", patch_embed)
        super().add_mixin("adaln_layer", adaln_layer)
        super().add_mixin("final_layer", final_layer)


def _added(hidden_bld: Tensor, positions: Tensor | None) -> Tensor:
    return hidden_bld if positions is None else hidden_bld + positions.to(hidden_bld.dtype)


def _two_layers(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, out_features), nn.SiLU(), nn.Linear(out_features, out_features)
    )

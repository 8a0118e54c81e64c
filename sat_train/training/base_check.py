"""Checks that a new run starts as the base whose weights it loads, with and without what is new."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sat_train.diffusion.parameterization import add_noise
from sat_train.encoding.encoded_batch import EncodedBatch
from sat_train.errors import CheckpointError
from sat_train.interchange.surgery import PROJECTION, Surgery
from sat_train.log import get_logger
from sat_train.models.dit.embedding import to_patches
from sat_train.models.dit.frame_levels import concatenated, frame_timesteps
from sat_train.models.dit.mixin import Mixin
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.objective.given import evaluation_mode
from sat_train.objective.video_diffusion import VideoDiffusion

log = get_logger(__name__)

_TOLERANCE = 1e-6  # of a sum of the same products in another order, fp32


@torch.no_grad()
def check_starts_as_base(pipeline: VideoDiffusion, batch: EncodedBatch, surgery: Surgery) -> None:
    """Compares a model with its base, on one batch and in place: there is no second copy of the weights.

    The widened embedding is computed in fp32, and may differ from that with the file's own projection by the
    order of its sums alone. The network is then computed in the run's dtype, with its new modules and
    channels and without: bit for bit the same. Both are given a timestep of each frame, the sample's, because
    a module that has time features of single frames rounds otherwise. Frames that are appended in time are
    left out of both: they have no weights, and attention reads them from the first step on.

    Raises:
        CheckpointError: They differ.

    Ranks: all of a model axis, before the weights are divided by ZeRO.
    """
    dit = pipeline.dit
    inputs = pipeline.validation_inputs(batch, torch.tensor([len(pipeline.alpha_bar) // 2]))
    given = inputs.dit.to(pipeline.device, pipeline.dtype)
    x_t = add_noise(inputs.x0_btchw, inputs.eps_btchw, pipeline.alpha_bar[inputs.timesteps_b])
    latent = x_t.to(pipeline.device, pipeline.dtype)
    whole = concatenated(latent, given.image_latent_btchw, given.channels_btchw)
    timesteps_b = inputs.timesteps_b.to(pipeline.device)
    levels_bt = frame_timesteps(timesteps_b, whole.shape[1])
    bare = whole
    if surgery.projection is not None:
        _check_embedding(dit, whole, surgery.projection)
        bare = whole.clone()
        bare[:, :, surgery.channels :] = 0

    def predict(channels: Tensor, without: Collection[str]) -> Tensor:
        others = {"levels_bt": levels_bt, "extras": given.extras}
        with dit.without_modules(without):
            v: Tensor = dit(channels, timesteps_b, given.text_bld, None, given.ofs_b, **others)
        return v

    exempt = {name for name in surgery.modules if not cast(Mixin, dit.mixins[name]).starts_as_base}
    with evaluation_mode(dit):
        base = predict(bare, surgery.modules)
        if not torch.equal(predict(whole, exempt), base):
            apart = {name: predict(bare, surgery.modules - {name}) for name in surgery.modules - exempt}
            apart["the new input channels"] = predict(whole, surgery.modules)
            raise _differing({name: (v - base).abs().max().item() for name, v in apart.items()})
    but = f", except for {', '.join(sorted(exempt))}" if exempt else ""
    log.info("checked on the first sample: the model starts as its base%s", but)


def _check_embedding(dit: DiffusionTransformer, latent_btchw: Tensor, projection: Tensor) -> None:
    patches = to_patches(latent_btchw.float(), dit.spec.patch)
    own = dit.get_parameter(PROJECTION).float().flatten(1)
    given = projection.to(own.device, dit.dtype).float().flatten(1)
    base = F.linear(patches[..., : given.shape[1]], given)
    difference = (F.linear(patches, own) - base).abs().max() / base.abs().max().clamp(min=1)
    if not difference <= _TOLERANCE:
        raise _differing({"the widened patch embedding": difference.item()})


def _differing(differences: dict[str, float]) -> CheckpointError:
    causes = ", ".join(f"{name} ({value:.3g})" for name, value in differences.items() if value != 0)
    return CheckpointError(
        f"the model does not start as the base whose weights it loads: {causes or 'its parts together'}",
        expected="outputs that are equal bit for bit on the first sample; 1e-6 for the patch embedding",
        remedy="begin the layer that writes into the base at zero (zero_ of sat_train.extend), or set "
        "starts_as_base = False in a module that is meant to change the base at once",
    )

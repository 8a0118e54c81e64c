"""Nothing between a batch and its gradients waits for the device.

The meta device stands for it: reading one of its tensors fails, so a wait is an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sat_train.diffusion.timestep_laws import CLEAN

META = torch.device("meta")


class BlockingCopies(TorchDispatchMode):
    """Counts copies to the device, and lists the shapes of those that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.copies, self.blocking = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        source = args[0] if name == "_to_copy" else args[1] if name == "copy_" else result
        if isinstance(source, torch.Tensor) and source.device != result.device:
            self.copies += 1
            if not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2]):
                self.blocking.append(tuple(source.shape))
        return result


class FirstClean:
    """Uniform timesteps, and a first frame without noise."""

    def __call__(self, uniform_b):
        return uniform_b

    def levels(self, timesteps_b, latent_shape, num_timesteps):
        return torch.where(torch.arange(latent_shape[1]) < 1, CLEAN, timesteps_b[:, None])


KINDS = {
    "plain": {},
    "everything": {"offset_noise_level": 0.1, "min_snr_gamma": 5.0, "stratified": True, "patch_t": 2},
    "image": {"image_to_video": True, "image_dropout": 0.5, "caption_dropout": 0.5, "ofs": 2.0},
    "empty prompt": {"caption_dropout": 0.5, "null_condition": "empty_prompt"},
    "levels": {"timestep_law": FirstClean()},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_step_copies_to_the_device_without_waiting_and_reads_nothing(
    make_pipeline, make_batch, encode, kind
):
    pipeline = make_pipeline(**KINDS[kind], device=META)
    batch = encode(pipeline, make_batch(range(2), frames=5))
    pipeline.dit.to(META)
    pipeline.encoders.device = META
    pipeline.training_loss(batch).loss.backward()  # the first makes tables of positions
    with BlockingCopies() as seen:
        pipeline.training_loss(batch).loss.backward()
    assert seen.copies > 0
    assert seen.blocking == []
    with BlockingCopies() as seen:
        torch.zeros(3).to(META)
    assert seen.blocking == [(3,)], "a copy that waits is noticed"

"""A tiny pipeline and batches for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from sat_train.data.batches import SampleBatch, StepPosition, VideoSample
from sat_train.data.sampler import AugmentationKey
from sat_train.diffusion.schedule import zero_snr_alpha_bar
from sat_train.distributed.processes import start_single_process
from sat_train.encoding.conditions.image import ImageCondition, OfsCondition
from sat_train.encoding.conditions.text import TextCondition
from sat_train.encoding.encode import Encode
from sat_train.encoding.encoded_batch import EncodedBatch
from sat_train.models.encoders import Encoders
from sat_train.models.vae.video_vae import VideoVAE
from sat_train.objective.video_diffusion import VideoDiffusion
from tests.networks import build_network

CHANNELS, TEXT_LENGTH, TEXT_WIDTH = 4, 3, 8


class TableTextEncoder:
    """Stands for T5, whose own tests are elsewhere: a fixed random embedding for each caption."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        generators = [torch.Generator().manual_seed(sum(caption.encode())) for caption in captions]
        return torch.stack(
            [torch.randn(TEXT_LENGTH, TEXT_WIDTH, generator=generator) for generator in generators]
        )


@pytest.fixture
def make_pipeline() -> Callable[..., VideoDiffusion]:
    """Returns a function that builds a pipeline with random weights, the same at every call."""

    def make(
        *,
        image_to_video: bool = False,
        patch_t: int = 1,
        ofs: float | None = None,
        caption_dropout: float = 0.0,
        image_dropout: float = 0.0,
        null_condition: str = "zero",
        known_empty_prompt: Callable[[], Tensor | None] = lambda: None,
        **options: object,
    ) -> VideoDiffusion:
        start_single_process()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vae = VideoVAE(ch=4, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=CHANNELS, norm_num_groups=2)
        dit = build_network(
            layers=1,
            in_channels=2 * CHANNELS if image_to_video else CHANNELS,
            out_channels=CHANNELS,
            patch=(patch_t, 2, 2),
            spatial_compression=4,
            latent_size=(4, 8, 8),
            text_width=TEXT_WIDTH,
            text_length=TEXT_LENGTH,
            ofs_width=None if ofs is None else 16,
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in dit.parameters():  # also those that start at zero, so that every input is felt
                parameter.normal_(std=0.05, generator=generator)
        vae = vae.eval().requires_grad_(False)
        encoders = Encoders(
            load_vae=lambda: vae,
            load_text_encoder=TableTextEncoder,
            geometry=dit.spec,
            dtype=options.get("dtype", torch.float32),
            device=torch.device("cpu"),
            known_empty_prompt=known_empty_prompt,
        )
        encoders.load()
        conditions = [
            TextCondition(
                null=null_condition, empty_prompt=encoders.empty_prompt, drop_probability=caption_dropout
            ),
            *([ImageCondition(scale=0.5, drop_probability=image_dropout)] if image_to_video else []),
            *([OfsCondition(ofs)] if ofs is not None else []),
        ]
        defaults = {"alpha_bar": zero_snr_alpha_bar(), "scale_factor": 0.7, "seed": 3}
        return VideoDiffusion(dit=dit, encoders=encoders, conditions=conditions, **{**defaults, **options})

    return make


@pytest.fixture
def make_batch() -> Callable[..., SampleBatch]:
    """Returns a function that makes a batch of the samples with the given global indices.

    Optimizer steps take `step_size` samples each, in order.
    """

    def make(
        indices: Sequence[int],
        *,
        frames: int = 5,
        images: bool = False,
        step_size: int = 8,
        training: bool = True,
    ) -> SampleBatch:
        def pixels(index: int, *shape: int) -> Tensor:
            generator = torch.Generator().manual_seed(index)
            return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

        return SampleBatch(
            samples=tuple(
                VideoSample(
                    video_tchw=pixels(index, frames, 3, 16, 16),
                    caption=f"clip {index}",
                    image_chw=pixels(1000 + index, 3, 16, 16) if images else None,
                    clip_id=f"{index}.mp4",
                    sample_index=index,
                    num_shown=frames,
                    augmentation=AugmentationKey(3, index),
                    training=training,
                )
                for index in indices
            ),
            step_positions=tuple(
                StepPosition(index // step_size, index % step_size, step_size) for index in indices
            ),
        )

    return make


@pytest.fixture
def encode() -> Callable[[VideoDiffusion, SampleBatch], EncodedBatch]:
    """Returns a function that encodes a batch for a pipeline."""
    return lambda pipeline, batch: Encode(pipeline.encoders, pipeline.conditions)(batch)

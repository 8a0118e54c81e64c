"""The shapes that samples may have: frames, height and width, and the tokens that they cost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sat_train.config.schema.data_section import VideoDatasetParams
from sat_train.config.schema.model_section import ModelConfig

ASPECT = re.compile(r"([1-9]\d{0,3}):([1-9]\d{0,3})", re.ASCII)
SAME_ASPECT = 0.03  # sizes of one aspect differ by this much, as they are rounded to whole patches


@dataclass(frozen=True, order=True)
class ClipShape:
    """Shape of a sample.

    Args:
        frames: Pixel frames, 4k + 1.
        height: In pixels.
        width: In pixels.
    """

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def allowed_sizes(params: VideoDatasetParams, model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Returns heights and widths: `video_size`, and those of `buckets`; each once."""
    sizes = [params.video_size]
    if params.buckets is not None:
        sizes += params.buckets.sizes
        aspects = filter(ASPECT.fullmatch, params.buckets.aspects)  # a rule names those that are none
        sizes += [size_of_aspect(aspect, params.video_size, model) for aspect in aspects]
    return tuple(dict.fromkeys(sizes))


def allowed_frames(params: VideoDatasetParams, model: ModelConfig) -> tuple[int, ...]:
    """Returns numbers of frames, the largest first: `max_num_frames`, those of `buckets`, and with
    `short_clip: shrink` all smaller ones at which the model's patches are filled as at `max_num_frames`."""
    frames = {params.max_num_frames, *(params.buckets.frames if params.buckets is not None else ())}
    if params.short_clip == "shrink":
        step = _frames_per_latent(model) * model.network_config.params.patch_size[0]
        frames.update(range(params.max_num_frames, 0, -step))
        frames.add(1)
    return tuple(sorted(frames, reverse=True))


def allowed_shapes(params: VideoDatasetParams, model: ModelConfig) -> tuple[ClipShape, ...]:
    """Returns every shape that a sample may have; with neither buckets nor shrinking it is one."""
    sizes = allowed_sizes(params, model)
    return tuple(ClipShape(frames, *size) for frames in allowed_frames(params, model) for size in sizes)


def size_of_aspect(aspect: str, video_size: tuple[int, int], model: ModelConfig) -> tuple[int, int]:
    """Returns the largest height and width of an aspect with at most as many pixels as `video_size`.

    An aspect that `video_size` has already gives that.

    Args:
        aspect: `width:height`.
        video_size: Height and width.
        model: What it must be a multiple of.
    """
    found = ASPECT.fullmatch(aspect)
    assert found is not None, aspect
    area, ratio = video_size[0] * video_size[1], int(found[1]) / int(found[2])
    if abs(math.log(ratio * video_size[0] / video_size[1])) <= SAME_ASPECT:
        return video_size
    height_by, width_by = size_multiples(model)
    height = max(1, math.floor(math.sqrt(area / ratio) / height_by + 1e-6)) * height_by
    width = max(1, math.floor(math.sqrt(area * ratio) / width_by + 1e-6)) * width_by
    return height, width


def count_tokens(shape: ClipShape, model: ModelConfig) -> int:
    """Returns the tokens of one sample, text included: what memory and time grow with."""
    patch_t, patch_h, patch_w = model.network_config.params.patch_size
    pixels = pixels_per_latent(model)
    latent_frames = (shape.frames - 1) // _frames_per_latent(model) + 1
    text = model.conditioner_config.params.emb_models[0].params.max_length
    patches = -(-latent_frames // patch_t) * (shape.height // (pixels * patch_h))
    return patches * (shape.width // (pixels * patch_w)) + text


def size_multiples(model: ModelConfig) -> tuple[int, int]:
    """Returns what heights and widths in pixels must be multiples of."""
    _, patch_h, patch_w = model.network_config.params.patch_size
    return pixels_per_latent(model) * patch_h, pixels_per_latent(model) * patch_w


def pixels_per_latent(model: ModelConfig) -> int:
    """Returns the pixels along one side of a latent."""
    levels: int = len(model.first_stage_config.params.encoder_config.params.ch_mult)
    return 1 << (levels - 1)


def _frames_per_latent(model: ModelConfig) -> int:
    return model.first_stage_config.params.encoder_config.params.temporal_compress_times


def linear_layers(num_layers: int, *, has_ofs: bool) -> tuple[str, ...]:
    """Returns the names of the transformer's linear layers, which adapters may be given to.

    Args:
        num_layers: Transformer layers.
        has_ofs: The network has the `ofs` embedding of 1.5 image-to-video.
    """
    inside = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    blocks = [f"transformer.layers.{layer}.{name}" for layer in range(num_layers) for name in inside]
    modulations = [f"mixins.adaln_layer.adaLN_modulations.{layer}.1" for layer in range(num_layers)]
    around = ["time_embed.0", "time_embed.2", "mixins.patch_embed.text_proj", "mixins.final_layer.linear"]
    around += ["mixins.final_layer.adaLN_modulation.1", *(("ofs_embed.0", "ofs_embed.2") if has_ofs else ())]
    return (*blocks, *modulations, *around)

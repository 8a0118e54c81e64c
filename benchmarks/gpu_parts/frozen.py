"""The frozen encoders: peaks and times of the autoencoder and of T5."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_parts.check import Check, Finding, Setting, at_most, peak_of, release, seconds_of, within
from benchmarks.gpu_parts.random_run import fill, read_run
from sat_train.config import RunConfig
from sat_train.encoding.build import build_loaded_text_encoder
from sat_train.encoding.cache.shards import EntryInfo, ShardWriter
from sat_train.encoding.cache.write_behind import WriteBehind
from sat_train.models.build import encoder_dtype
from sat_train.models.dit.sat_layers import building
from sat_train.models.encoders import Encoders
from sat_train.models.text.t5 import T5TextEncoder
from sat_train.models.text.t5_encoder import T5_XXL, T5Encoder
from sat_train.models.text.tokenizer import read_tokenizer
from sat_train.models.vae.build import build_vae
from sat_train.models.vae.video_vae import VideoVAE
from sat_train.planning.counting import Count, count_captions, count_decoding, count_encoding
from sat_train.planning.duration import encoding_seconds
from sat_train.planning.gpu_memory import Weights

_WORKSPACE = 1.4  # of cuDNN, which nobody counts, as a factor on what is counted
_WHOLE = ("model.first_stage_config.params.tile_samples=false",)
_CAPTIONS = 8
_CLIPS = 12
# of bf16 over T5's layers: 0.015 at 24 layers and a width of 1024, where products are summed in another order
_ROUNDING = 0.03


def autoencoder(setting: Setting, *, model: str) -> Iterator[Finding]:
    """Yields peaks and times of encoding and decoding one clip of the model's size, whole and in tiles."""
    for decoding, words in (("decoding", _WHOLE), ("decoding in tiles", ())):
        config = read_run(setting, model, "sft", "args.bf16=true", *words)
        vae, clip, latent = _vae(setting, config), *_inputs(setting, config)
        if words:
            encode, counted = partial(vae.encode_moments, clip), count_encoding(config)
            yield from _measured(setting, "encoding", vae, encode, counted)
        decode = partial(vae.decode, latent, vae.sample_tiling)
        yield from _measured(setting, decoding, vae, decode, count_decoding(config))
        del vae, decode
        release()


def _measured(
    setting: Setting, name: str, vae: VideoVAE, run: Callable[[], object], counted: Count
) -> Iterator[Finding]:
    """Yields peak and time of a call of an autoencoder against what was counted."""
    with torch.no_grad():
        peak = peak_of(setting, vae, run)
        seconds = seconds_of(setting, run, repeats=2)
    # a CPU computes these convolutions another way, with other copies
    most = _WORKSPACE if setting.on_gpu else 3
    yield within(f"{name}: peak, MB", peak / 1e6, counted.peak / 1e6, least=0.8, most=most)
    weights = Weights(transformer=0, trained=(), vae=0, text_encoder=0)
    planned = encoding_seconds(counted.work, weights, setting.card, text_tokens=0, text_on_host=False)
    what = f"{name}, s"
    if setting.on_gpu:
        yield within(what, seconds, planned, least=0.4, most=1.5)
    else:
        yield Finding(what, seconds)


def _vae(setting: Setting, config: RunConfig) -> VideoVAE:
    vae = build_vae(config.spec, device=setting.mesh.device, dtype=encoder_dtype(config.args))
    fill(vae, setting.mesh)
    return vae


def _inputs(setting: Setting, config: RunConfig) -> tuple[Tensor, Tensor]:
    data, like = config.require_data().params, {"device": setting.mesh.device}
    clip = torch.rand(1, data.max_num_frames, 3, *data.video_size, **like) * 2 - 1
    shape = config.spec.latent(data.max_num_frames, *data.video_size)
    size = (1, shape.padded_frames, config.spec.out_channels, shape.height, shape.width)
    return clip, torch.randn(size, dtype=torch.bfloat16, **like)


def text_encoder(setting: Setting) -> Iterator[Finding]:
    """Yields memory and time of T5-XXL with random weights; of the embedded T5 where all is tiny."""
    config = read_run(setting, "cogvideox_5b", "sft", "args.bf16=true")
    before = torch.cuda.memory_allocated() if setting.on_gpu else 0
    encoder = build_loaded_text_encoder(config, setting.mesh.device) if setting.tiny else _xxl(setting)
    count = sum(parameter.numel() for parameter in encoder.parameters())
    if setting.on_gpu and not setting.tiny:
        taken = torch.cuda.memory_allocated() - before
        yield within("weights, GB", taken / 1e9, 2 * count / 1e9, least=0.95, most=1.05)
    captions = [f"a caption, number {index}" for index in range(_CAPTIONS)]
    texts = []
    peak = peak_of(setting, encoder, lambda: texts.append(encoder.encode(captions)))
    planned = _WORKSPACE * count_captions(config).peak
    yield at_most("peak besides weights, MB", peak / 1e6, planned / 1e6)
    expected = f"{_CAPTIONS} x {encoder.max_length}, finite"
    is_right = texts[0].shape[:2] == (_CAPTIONS, encoder.max_length) and bool(texts[0].isfinite().all())
    yield Finding("embeddings", "x".join(map(str, texts[0].shape)), expected, is_right)
    seconds = seconds_of(setting, lambda: encoder.encode(captions), repeats=3)
    if setting.on_gpu and not setting.tiny:
        planned = 2 * count * encoder.max_length * _CAPTIONS / setting.card.matmul_tflops / 1e12
        yield within(f"{_CAPTIONS} captions, s", seconds, planned, least=0.5, most=2)
    one_by_one = torch.cat([encoder.encode([caption]) for caption in captions])
    yield at_most("together against one by one", _difference(texts[0], one_by_one), _ROUNDING)
    if setting.on_gpu:
        encoder.cpu()
        seconds = seconds_of(setting, lambda: texts.append(encoder.encode(captions[:1])))
        yield Finding("a caption on the CPU, s", seconds)
        yield at_most("the CPU against the GPU", _difference(texts[-1], texts[0][:1]), _ROUNDING)


def _difference(texts: Tensor, others: Tensor) -> float:
    """Returns the root mean square of a difference, as a share of that of the values."""
    ours, theirs = texts.float().cpu(), others.float().cpu()
    return float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())


def writing(setting: Setting) -> Iterator[Finding]:
    """Yields what writing encodings to a cache adds to encoding them: a thread does it meanwhile."""
    config = read_run(setting, "cogvideox_5b", "sft", "args.bf16=true")
    vae, data = _vae(setting, config), config.require_data().params
    encoders = Encoders(
        load_vae=lambda: vae,
        load_text_encoder=lambda: build_loaded_text_encoder(config, setting.mesh.device),
        geometry=config.spec,
        dtype=torch.bfloat16,
        device=setting.mesh.device,
    )
    encoders.load(text=False)
    clip = torch.zeros(data.max_num_frames, 3, *data.video_size, dtype=torch.uint8)
    clip = clip.pin_memory() if setting.on_gpu else clip
    writer = WriteBehind(ShardWriter(setting.folder / "cache", shard_bytes=20_000_000))

    def encode(*, keeps: bool) -> None:
        for number in range(_CLIPS):
            encodings = encoders.video(clip, subject="clip")
            if keeps:
                writer.add(f"{number}", encodings, EntryInfo("clip", f"{number}", "vae"))

    encode(keeps=False)
    alone = seconds_of(setting, partial(encode, keeps=False))
    written = seconds_of(setting, partial(encode, keeps=True))
    writer.publish()
    yield Finding("a clip, s", alone / _CLIPS)
    what, limit = "a clip that is kept, s", 1.05 * alone / _CLIPS
    yield at_most(what, written / _CLIPS, limit) if setting.on_gpu else Finding(what, written / _CLIPS)


def _xxl(setting: Setting) -> T5TextEncoder:
    tiny = Path(read_run(setting, "cogvideox_tiny", "sft").spec.text.model_dir)
    with building(setting.mesh.device, torch.bfloat16):
        transformer = T5Encoder(T5_XXL)
    fill(transformer, setting.mesh, deviation=_t5_deviation)
    return T5TextEncoder(transformer=transformer, tokenizer=read_tokenizer(tiny), max_length=226)


def _t5_deviation(name: str, weight: Tensor) -> float:
    """Returns the deviation that T5 starts with.

    Its attention divides no score by a square root; with larger queries each takes one token, and rounding
    decides which.
    """
    if name == "shared.weight":
        return 1.0
    if "relative_attention_bias" in name:
        return T5_XXL.d_model**-0.5
    scale: float = T5_XXL.d_kv**-0.5 if name.endswith(".q.weight") else 1.0
    return scale * weight.shape[1] ** -0.5


CHECKS = (
    Check("vae_480", 1, "encode and decode 49 x 480 x 720", partial(autoencoder, model="cogvideox_5b")),
    Check(
        "vae_768",
        3,
        "encode and decode 81 x 768 x 1360",
        partial(autoencoder, model="cogvideox1.5_5b"),
        on_cpu=False,  # at the embedded size the one above
    ),
    Check("t5", 1, "T5-XXL: memory and time of captions, together, one by one and on the CPU", text_encoder),
    Check("writing", 1, "what writing encodings adds to encoding them", writing),
)

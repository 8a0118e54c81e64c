"""Rules on the shapes of the model and of its inputs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sat_train.config.other_trainers import LORA_TARGETS
from sat_train.config.parts import condition_parts, module_parts
from sat_train.config.parts.loss_term_parts import DIFFUSION, DIFFUSION_TERM, LossTermConfig
from sat_train.config.parts.noise_schedule import ZeroSNRDDPMDiscretizationParams
from sat_train.config.parts.position_parts import Rotary3DPositionEmbeddingParams
from sat_train.config.rule import ParsedConfig, rule
from sat_train.config.schema.encoder_slots import VideoCoderParams
from sat_train.config.shapes import ASPECT, allowed_shapes, allowed_sizes
from sat_train.errors import Fault

_NETWORK = "model.network_config.params"
_LORA = f"{_NETWORK}.modules.lora_config.params"
_POSITION = f"{_NETWORK}.modules.pos_embed_config"
_VAE = "model.first_stage_config.params"
_CODER, _DECODER = f"{_VAE}.encoder_config.params", f"{_VAE}.decoder_config.params"
_OF_ONE_CODER = {"in_channels", "out_ch"}
_TIMESTEPS = "model.loss_fn_config.params.sigma_sampler_config.params"
_SAMPLER = "model.sampler_config.params"
_BUCKETS = "data.params.buckets"
# A pattern of an untrusted file must not run forever: see `_wanted_of_pattern`.
_LONGEST_PATTERN = 200
_REPEATED_GROUP = re.compile(r"\)[*+{?]")
_REPEATS = re.compile(r"(?<!\\)[*+{]")
_ROTARY_MULTIPLE = 16  # time takes 1/4 of a head, height and width 3/8 each, all even


@rule("data.params.max_num_frames", "data.params.buckets.frames")
def frames_are_4k_plus_1(config: ParsedConfig) -> Iterator[Fault]:
    if config.data is None:
        return
    params = config.data.params
    lengths = [("data.params.max_num_frames", params.max_num_frames)]
    if params.buckets is not None:
        lengths += [(f"{_BUCKETS}.frames.{i}", frames) for i, frames in enumerate(params.buckets.frames)]
    for path, frames in lengths:
        if not config.spec.has_whole_latents(frames):
            below, above = config.spec.nearest_frames(frames)
            kind = f"{config.spec.temporal_compression}k+1"
            yield config.fault(
                path, frames, f"{kind} frames: {frames} is not {kind}, nearest {below} or {above}"
            )
        elif frames > params.max_num_frames:
            yield config.fault(path, frames, f"at most data.params.max_num_frames = {params.max_num_frames}")


@rule("data.params.buckets.aspects")
def aspects_are_ratios(config: ParsedConfig) -> Iterator[Fault]:
    if config.data is None or config.data.params.buckets is None:
        return
    for i, aspect in enumerate(config.data.params.buckets.aspects):
        if not ASPECT.fullmatch(aspect):
            yield config.fault(f"{_BUCKETS}.aspects.{i}", aspect, "width:height, e.g. 16:9")


@rule("data.params", f"{_NETWORK}.patch_size", f"{_VAE}.encoder_config", "model.conditioner_config")
def budget_holds_one_sample(config: ParsedConfig) -> Iterator[Fault]:
    if config.data is None or config.data.params.buckets is None:
        return
    budget = config.data.params.buckets.max_tokens
    spec = config.spec
    shapes = allowed_shapes(config.data.params, spec)
    tokens, shape = max((spec.tokens(spec.latent(*shape)), shape) for shape in shapes)
    if budget is not None and budget < tokens:
        yield config.fault(f"{_BUCKETS}.max_tokens", budget, f"at least {tokens}, one sample of {shape}")


@rule("args.sampling_num_frames", f"{_NETWORK}.patch_size")
def sampled_latents_fill_patches(config: ParsedConfig) -> Iterator[Fault]:
    frames, spec = config.args.sampling_num_frames, config.spec
    if frames is not None and (padding := spec.padding(frames)):
        expected = f"latent frames divisible by the patch's {spec.patch[0]} frames: {frames + padding}"
        yield config.fault("args.sampling_num_frames", frames, expected)


@rule(
    "data.params.video_size",
    "data.params.buckets.sizes",
    "args.sampling_image_size",
    f"{_NETWORK}.patch_size",
    f"{_VAE}.encoder_config",
)
def sizes_fill_patches(config: ParsedConfig) -> Iterator[Fault]:
    multiples = config.spec.size_multiples
    sizes = {"args.sampling_image_size": config.args.sampling_image_size}
    if config.data is not None:
        sizes["data.params.video_size"] = config.data.params.video_size
        if config.data.params.buckets is not None:
            sizes |= {f"{_BUCKETS}.sizes.{i}": s for i, s in enumerate(config.data.params.buckets.sizes)}
    for path, size in sizes.items():
        if size is not None and any(side <= 0 or side % by for side, by in zip(size, multiples, strict=True)):
            nearest = [max(round(side / by), 1) * by for side, by in zip(size, multiples, strict=True)]
            yield config.fault(
                path, size, f"height and width divisible by {multiples[0]} and {multiples[1]}: {nearest}"
            )


@rule("data.params", _NETWORK, f"{_VAE}.encoder_config")
def fixed_positions_fit_size(config: ParsedConfig) -> Iterator[Fault]:
    spec = config.spec
    if config.data is None or spec.positions.params.takes_any_size:
        return
    trained = tuple(size * spec.spatial_compression for size in spec.trained_latent[1:])
    remedy = f"or {_POSITION}.params.size_policy: interpolate"
    if config.data.params.video_size != trained:
        expected = f"{list(trained)}, the size of this model's positions, {remedy}"
        yield config.fault("data.params.video_size", config.data.params.video_size, expected)
    elif any(size != trained for size in allowed_sizes(config.data.params, spec)):
        others = config.data.params.buckets.sizes + config.data.params.buckets.aspects  # type: ignore[union-attr]
        expected = f"no other size: this model's positions are those of {list(trained)} alone; {remedy}"
        yield config.fault(_BUCKETS, [str(other) for other in others], expected)
    frames = config.data.params.max_num_frames
    if frames > spec.trained_frames:
        yield config.fault(
            "data.params.max_num_frames", frames, f"at most the {spec.trained_frames} of this model"
        )


@rule(_NETWORK, f"{_VAE}.encoder_config.params.z_channels", "model.noised_image_input")
def channels_fit(config: ParsedConfig) -> Iterator[Fault]:
    spec, latent = config.spec, config.spec.coder.z_channels
    if spec.out_channels != latent:
        yield config.fault(
            f"{_NETWORK}.out_channels", spec.out_channels, f"{latent}, the autoencoder's z_channels"
        )
    kind, channels = "text-to-video (noised_image_input: false)", latent
    if "image" in spec.conditions:
        kind, channels = "image-to-video (noised_image_input: true)", 2 * latent
    own = spec.in_channels - spec.condition_channels  # those are added to it
    if own != channels:
        yield config.fault(f"{_NETWORK}.in_channels", own, f"{channels} for {kind}")


@rule(
    f"{_NETWORK}.hidden_size",
    f"{_NETWORK}.num_attention_heads",
    f"{_NETWORK}.modules",
    "args.model_parallel_size",
)
def heads_fit(config: ParsedConfig) -> Iterator[Fault]:
    heads, width = config.spec.heads, config.spec.width
    if width % heads:
        yield config.fault(f"{_NETWORK}.hidden_size", width, f"divisible by num_attention_heads = {heads}")
        return
    own = config.spec.head_width
    positions = config.spec.positions.params
    if isinstance(positions, Rotary3DPositionEmbeddingParams):
        value = positions.hidden_size_head
        if own % _ROTARY_MULTIPLE:
            expected = f"heads of a width divisible by {_ROTARY_MULTIPLE}; now {own}"
            yield config.fault(f"{_NETWORK}.num_attention_heads", heads, expected)
        elif value not in (None, own):
            yield config.fault(f"{_POSITION}.params.hidden_size_head", value, f"{own}: hidden_size / heads")
    ranks = config.args.model_parallel_size
    if heads % ranks:
        yield config.fault("args.model_parallel_size", ranks, f"a divisor of num_attention_heads = {heads}")


@rule(f"{_NETWORK}.ofs_embed_dim", f"{_NETWORK}.time_embed_dim", f"{_NETWORK}.hidden_size")
def ofs_adds_to_time(config: ParsedConfig) -> Iterator[Fault]:
    time, ofs = config.spec.time_width, config.spec.ofs_width
    if ofs not in (None, time):
        yield config.fault(f"{_NETWORK}.ofs_embed_dim", ofs, f"{time}, as time_embed_dim")


def _repeats(config: ParsedConfig, path: str, expected: object, of: str) -> Iterator[Fault]:
    """Yields a fault where a key that repeats a number holds another one."""
    if (value := config.value(path)) != expected:
        yield config.fault(path, value, f"{expected}, {of}")


@rule(f"{_POSITION}.params.text_length", "model.conditioner_config")
def text_lengths_agree(config: ParsedConfig) -> Iterator[Fault]:
    path = "model.conditioner_config.params.emb_models.0.params.max_length"
    yield from _repeats(config, path, config.spec.text_length, f"as {_POSITION}.params.text_length")


@rule(_VAE)
def coders_agree(config: ParsedConfig) -> Iterator[Fault]:
    for name in (key for key in VideoCoderParams.model_fields if key not in _OF_ONE_CODER):
        yield from _repeats(
            config, f"{_DECODER}.{name}", getattr(config.spec.coder, name), "as the encoder's"
        )


@rule(_VAE)
def autoencoder_divides_evenly(config: ParsedConfig) -> Iterator[Fault]:
    vae, coder, side = config.spec.vae, config.spec.coder, config.spec.spatial_compression
    time = coder.temporal_compress_times
    if time & (time - 1) or time > side:
        yield config.fault(f"{_CODER}.temporal_compress_times", time, f"a power of two up to {side}")
    if any(coder.ch * factor % coder.norm_num_groups for factor in (1, *coder.ch_mult)):
        yield config.fault(f"{_CODER}.norm_num_groups", coder.norm_num_groups, "a divisor of all widths")
    if (vae.encode_chunk_frames or 0) % time:
        yield config.fault(f"{_VAE}.encode_chunk_frames", vae.encode_chunk_frames, f"a multiple of {time}")
    if any(size <= 0 or size % side for size in vae.tile_size):
        yield config.fault(f"{_VAE}.tile_size", vae.tile_size, f"multiples of {side} pixels")
    if any(o % side or not 0 <= o < size for o, size in zip(vae.tile_overlap, vae.tile_size, strict=True)):
        expected = f"multiples of {side} pixels below tile_size = {list(vae.tile_size)}"
        yield config.fault(f"{_VAE}.tile_overlap", vae.tile_overlap, expected)


@rule("model.denoiser_config", "model.loss_fn_config", "model.sampler_config")
def one_noise_schedule(config: ParsedConfig) -> Iterator[Fault]:
    schedule = config.spec.schedule
    for path in (f"{_TIMESTEPS}.discretization_config", f"{_SAMPLER}.discretization_config"):
        for name in ZeroSNRDDPMDiscretizationParams.model_fields if config.value(path) is not None else ():
            key = f"{path}.params.{name}"
            yield from _repeats(config, key, getattr(schedule, name), "as model.denoiser_config says")
    for path in ("model.denoiser_config.params.num_idx", f"{_TIMESTEPS}.num_idx"):
        yield from _repeats(config, path, schedule.num_timesteps, "the steps of the noise schedule")


@rule(f"{_NETWORK}.modules.lora_config", "model.not_trainable_prefixes")
def adapters_have_a_frozen_base(config: ParsedConfig) -> Iterator[Fault]:
    has_adapters = config.spec.adapter is not None
    frozen = config.model.not_trainable_prefixes
    if has_adapters and "all" not in frozen:
        yield config.fault("model.not_trainable_prefixes", frozen, "['all'], because lora_config is given")
    trains = has_adapters or config.model.train or config.model.modules
    if "all" in frozen and not trains and config.purpose == "train":
        yield config.fault(
            "model.not_trainable_prefixes",
            frozen,
            f"[], or {_NETWORK}.modules.lora_config: nothing is left to train",
        )


@rule(f"{_NETWORK}.modules.lora_config", f"{_NETWORK}.num_layers", f"{_NETWORK}.ofs_embed_dim")
def adapters_find_their_layers(config: ParsedConfig) -> Iterator[Fault]:
    if config.spec.adapter is None:
        return
    params, names = config.spec.adapter.params, config.spec.linear_layers()
    is_sound = True
    for index, target in enumerate(params.targets):
        expected = _wanted_of_pattern(target, names)
        if expected:
            is_sound = False
            ours = LORA_TARGETS.get(target.rpartition("attn1.")[2], "")
            yield config.fault(f"{_LORA}.targets.{index}", target, expected, ours)
    adapted = params.targeted(names) if is_sound else names
    for group in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(params, group):
            if expected := _wanted_of_pattern(pattern, adapted):
                yield config.fault(f"{_LORA}.{group}", pattern, expected)


def _wanted_of_pattern(pattern: str, names: tuple[str, ...]) -> str:
    """Returns the expectation that a pattern of linear layers fails; nothing where it is valid."""
    if expected := _fault_of_expression(pattern):
        return expected
    finds = any(re.search(pattern, name) for name in names)
    example = names[min(2, len(names) - 1)]
    return "" if finds else f"a pattern that finds a linear layer, such as {names[0]} or {example}"


def _fault_of_expression(pattern: str) -> str:
    """Returns the expectation that a regular expression fails; nothing where it is valid."""
    if (
        len(pattern) > _LONGEST_PATTERN
        or _REPEATED_GROUP.search(pattern)
        or len(_REPEATS.findall(pattern)) > 3
    ):
        return "a short pattern: no repeated group, at most three of `*`, `+` and `{}`"
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return "a regular expression"
    return ""


@rule("model.train", "model.freeze", "deepspeed.optimizer", f"{_NETWORK}.modules.lora_config")
def patterns_of_weights_are_valid(config: ParsedConfig) -> Iterator[Fault]:
    """Patterns that are no short regular expressions, and factors for an optimizer with one rate."""
    train, optimizer, adapter = config.model.train, config.deepspeed.optimizer, config.spec.adapter
    patterns = [(f"model.freeze.{i}", each) for i, each in enumerate(config.model.freeze)]
    patterns += [(f"model.train.{k}.match.{i}", p) for k, t in train.items() for i, p in enumerate(t.match)]
    for path, pattern in patterns:
        if expected := _fault_of_expression(pattern):
            yield config.fault(path, pattern, expected)
    factors = {f"model.train.{name}.lr": each.lr for name, each in train.items()}
    for name, factor in (adapter.params.lr_factors if adapter is not None else {}).items():
        factors[f"{_LORA} ({name})"] = factor
    for path, factor in factors.items():
        if factor != 1 and optimizer.params.has_one_rate:
            yield config.fault(path, factor, f"1: {optimizer.type} has one rate for all weights")


@rule("model.conditions", "model.modules")
def names_of_parts_are_free(config: ParsedConfig) -> Iterator[Fault]:
    reserved = {"conditions": condition_parts.TAKEN, "modules": module_parts.TAKEN}
    for group, names in reserved.items():
        for name in getattr(config.model, group):
            if name in names:
                yield config.fault(
                    f"model.{group}.{name}", name, f"another name: {', '.join(names)} are taken"
                )


@rule("model.loss_terms", "model.conditions", f"{_NETWORK}.modules.lora_config")
def loss_terms_have_what_they_need(config: ParsedConfig) -> Iterator[Fault]:
    """The reserved name, weights that leave nothing to train, and terms without adapters to switch off."""
    terms = config.model.loss_terms
    gives_pairs = any(each.params.adds_rows for each in config.model.conditions.values())
    for name, term in terms.items():
        path = f"model.loss_terms.{name}"
        if (name == DIFFUSION) != (term.target == DIFFUSION_TERM):
            others = ", ".join(name for name in LossTermConfig.records() if name != DIFFUSION_TERM)
            expected = DIFFUSION_TERM if name == DIFFUSION else f"a term besides {DIFFUSION}: {others}"
            yield config.fault(f"{path}.target", term.target, expected)
            continue
        if term.params.needs_reference and config.spec.adapter is None:
            expected = f"adapters: the reference of {path}, {term.target}, is the model without them"
            yield config.fault(f"{_NETWORK}.modules.lora_config", None, expected)
        if term.params.needs_pairs and not gives_pairs:
            expected = "a condition of pairs in model.conditions, such as PreferencePairs"
            yield config.fault(f"{path}.target", term.target, expected)
    if gives_pairs and not any(term.params.needs_pairs for term in terms.values()):
        expected = "a term that compares pairs, such as Preference: model.conditions has pairs"
        yield config.fault("model.loss_terms", sorted(terms), expected)
    if DIFFUSION in terms and not any(term.weight for term in terms.values()):
        yield config.fault(f"model.loss_terms.{DIFFUSION}.weight", 0, "a term with a weight above 0")

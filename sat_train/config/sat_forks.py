"""Keys and classes that forks of CogVideo's `sat/` have added: what each did there, and its name here.

None of them is read. Instead of "a key that exists", a message says how the same is reached here, most often
by a condition, a network module or a loss term. `trained_names.py` and `batch_keys.py` hold those that are
understood.

Source: the YAML files, `arguments.py`, `diffusion_video.py` and `dit_video_concat.py` of
fudan-generative-vision/hallo3@e342dce, alibaba/Tora@9a23dce, MoCa-VideoGen/MoCa@f67a575,
ML-GSAI/Concat-ID@b15cb95, aayank-singhai/ReSim-Exp@9acfff2, langmanbusi/InsViE@e6f6b6f,
wenqsun/DimensionX@18d3cfe and hologerry/CogVideo@88c13d7.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sat_train.config.aliases import remove_value
from sat_train.config.layers import Merged
from sat_train.config.values import show_value
from sat_train.errors import Fault

PAGE = "docs/extend.md"
_FIELD = "a field computed beforehand, under `data.fields`"
_SAMPLED = "sampling takes the fields of a sample; there is no option for it"
_MODULE = "a setting of the network module, under `model.modules`"
_LEVELS = "a law of `timesteps` that gives clean frames the level -1, or the condition `FramesInSlot`"
_LOSS = "a term of an extension under `model.loss_terms`, which decodes what it compares"
_SOURCES = "manifests under `args.train_data`, whose rows name clips and captions"
_EMBEDDER = re.compile(r"model\.conditioner_config\.params\.emb_models\.[1-9]\d*")
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_NETWORK = "model.network_config.params"
_PATCHES = f"{_NETWORK}.modules.patch_embed_config.params"
_LOSS_PARAMS = "model.loss_fn_config.params"


@dataclass(frozen=True)
class ForkKey:
    """A key that a fork has added.

    Args:
        project: The fork.
        meaning: What the key did there.
        instead: What it is called here.
    """

    project: str
    meaning: str
    instead: str

    def __str__(self) -> str:
        return f"a key that exists; in {self.project}: {self.meaning}; here: {self.instead} ({PAGE})"


# Patterns as in a shell; the first that matches counts.
FORK_KEYS = {
    "model.ref_network_config": ForkKey(
        "hallo3",
        "a second transformer, to whose states the first one attends",
        "a network module that holds a `BlockStack`, under `model.modules`",
    ),
    "model.ref_net_path": ForkKey(
        "hallo3",
        "weights of the reference network",
        "`reinit` of the module, which copies from the base that args.load names",
    ),
    f"{_NETWORK}.transformer_args.*cross_attn_hidden_size": ForkKey(
        "hallo3", "width of the features that every block attends to", _MODULE
    ),
    f"{_NETWORK}.add_audio_module": ForkKey(
        "hallo3", "gives every block attention to the audio", "naming a network module under `model.modules`"
    ),
    "args.wav2vec_*": ForkKey("hallo3", "audio features, computed while sampling", _FIELD),
    "args.audio_separator_model_path": ForkKey("hallo3", "separates the voice while sampling", _FIELD),
    "args.sample_rate": ForkKey("hallo3", "rate of the audio", _FIELD),
    "args.face_analysis_model_path": ForkKey("hallo3", "face features, computed while sampling", _FIELD),
    "args.vis_traj_features": ForkKey(
        "Tora",
        "writes pictures of the features of trajectories",
        "`sat-train data preview`, which shows fields",
    ),
    "args.sample_flow": ForkKey("Tora", "keeps the optical flow at a few points only", _FIELD),
    "args.flow_*": ForkKey("Tora", "the trajectories of a prompt", _SAMPLED),
    "args.no_flow_injection": ForkKey("Tora", "samples without the condition", "leaving the field out"),
    "args.img_dir": ForkKey("Tora", "folder of the prompts' pictures", "paths in `args.input_file`"),
    "model.unfreeze_adaLN_gate": ForkKey(
        "Tora", "also trains the gates of all blocks", "`model.train`, with a pattern of their names"
    ),
    "model.ref_image_dropout": ForkKey(
        "Concat-ID",
        "share of samples without reference images",
        "`drop` of the condition `ReferenceFrames`, under `model.conditions`",
    ),
    "args.contextimage2video": ForkKey("Concat-ID", "samples with reference images", _SAMPLED),
    "model.cond_inds_sampling": ForkKey("ReSim", "latent frames that stay clean in sampling", _LEVELS),
    f"{_LOSS_PARAMS}.cond_inds*": ForkKey("ReSim", "latent frames that stay clean, and how often", _LEVELS),
    f"{_LOSS_PARAMS}.apply_cond_aug": ForkKey("ReSim", "noise level of the frames that are given", _LEVELS),
    "model.sampler_config.params.cond_inds_sampling": ForkKey("ReSim", "frames that stay clean", _LEVELS),
    "model.sampler_config.params.apply_cond_aug*": ForkKey("ReSim", "noise level of given frames", _LEVELS),
    f"{_LOSS_PARAMS}.sigma_sampler_config.params.custom_sampling": ForkKey(
        "ReSim", "draws some timesteps more often", "another `target` of `sigma_sampler_config`"
    ),
    "model.en_and_decode_n_frames_a_time": ForkKey(
        "ReSim", "frames at once in the autoencoder", "`model.first_stage_config.params.encode_chunk_frames`"
    ),
    "model.truncate_n_frames_decode": ForkKey(
        "ReSim", "decodes the first latent frames only", "`args.sampling_num_frames`, which samples fewer"
    ),
    f"{_PATCHES}.cond_emb_in_dim": ForkKey(
        "ReSim", "tells the network which frames are given", "`before_blocks` of a network module"
    ),
    "args.sampling_video_size": ForkKey("ReSim", "height and width", "`args.sampling_image_size`"),
    "args.n_prediction_round": ForkKey(
        "ReSim", "rolls out: each clip begins with the end of the last", "a script around `sat-train sample`"
    ),
    "args.apply_traj": ForkKey("ReSim", "samples with trajectories", _SAMPLED),
    "args.save_gt": ForkKey("ReSim", "writes the true clip too", "contact sheets of validation"),
    "args.concat_gt_for_demo": ForkKey("ReSim", "shows the true clip too", "contact sheets of validation"),
    "data.params.prefix_prompt": ForkKey("ReSim", "begins every caption", _SOURCES),
    "data.params.merge_static": ForkKey("ReSim", "renames commands", _SOURCES),
    "data.params.exclude_highly_static": ForkKey("ReSim", "leaves clips out", _SOURCES),
    "data.params.p_mask_out_heading": ForkKey("ReSim", "share without a heading", "`drop` of the condition"),
    "data.params.p_drop_action_caption": ForkKey(
        "ReSim",
        "share of captions without the command",
        "`ucg_rate` of the text encoder, or `drop` of a condition that holds the command",
    ),
    "data.params.n_repeat_of_actions": ForkKey(
        "ReSim", "repeats clips of some commands", "`args.train_data_weights`, or the column `weight`"
    ),
    f"{_PATCHES}.is_edit": ForkKey(
        "InsViE",
        "the source video stands next to the latent, on channels",
        "the condition `ControlVideo` with `into: channels`, under `model.conditions`",
    ),
    f"{_PATCHES}.emb_ver": ForkKey(
        "InsViE", "doubled channels, or a second projection", "`into` of the condition `ControlVideo`"
    ),
    "model.video_input_dropout": ForkKey(
        "InsViE", "share of samples without the source video", "`drop` of the condition `ControlVideo`"
    ),
    f"{_LOSS_PARAMS}.use_lpips": ForkKey("InsViE", "adds a perceptual loss", _LOSS),
    "model.use_lpips": ForkKey("InsViE", "adds a perceptual loss", _LOSS),
    "model.lpips_weight": ForkKey("InsViE", "weight of that loss", f"`weight` of {_LOSS}"),
    f"{_LOSS_PARAMS}.lpips_weight": ForkKey(
        "InsViE", "weight of the perceptual loss", f"`weight` of {_LOSS}"
    ),
    f"{_LOSS_PARAMS}.frameloss_weight": ForkKey("InsViE", "weight of the first frames' error", _LOSS),
    "args.test_folder": ForkKey("InsViE", "folder of the source videos", _SAMPLED),
    "data.params.caption_dir": ForkKey("DimensionX", "table of captions", _SOURCES),
    "data.params.output_dir": ForkKey("DimensionX", "folder for clips as read", "`sat-train data preview`"),
    "args.summary_dir": ForkKey("hologerry/CogVideo", "folder for TensorBoard", "`args.tensorboard`"),
    "data.params.cam_str": ForkKey("hologerry/CogVideo", "list of clips, by camera", _SOURCES),
    "data.params.paths_post": ForkKey("hologerry/CogVideo", "list of clips, by its ending", _SOURCES),
    "args.sdedit_*": ForkKey(
        "hologerry/CogVideo", "adds noise to a given video and samples from there", "an extension's sampler"
    ),
    "deepspeed.debug": ForkKey("MoCa", "nothing, DeepSpeed has no such section", "leave it out"),
}


def answer_fork_keys(merged: Merged, faults: list[Fault]) -> None:
    """Answers the keys of SAT forks, and removes them from the tree.

    Args:
        merged: Changed in place, before it is validated.
        faults: Receives for each what it did there and what it is called here.
    """
    for path, value in list(_groups_and_leaves(merged.tree, "")):
        answer = _embedder(value) if _EMBEDDER.fullmatch(path) else _find(path)
        if answer is not None:
            faults.append(Fault(path, show_value(value), str(answer), merged.source_of(path)))
            remove_value(merged, path)


def about_class(path: str, value: str) -> str:
    """Returns what becomes of a class that a fork has added; an empty text for other values.

    Args:
        path: A key whose value is not allowed.
        value: That value.
    """
    if not _CLASS.fullmatch(value) or path.rpartition(".")[2] not in ("target", "type"):
        return ""
    if path == "data.target":
        return f"; what else a fork's data set reads are `data.fields` here ({PAGE})"
    return f"; a fork's class is a part here, which an extension registers ({PAGE})"


@lru_cache(maxsize=1024)
def _find(path: str) -> ForkKey | None:
    return next((key for pattern, key in FORK_KEYS.items() if fnmatch.fnmatchcase(path, pattern)), None)


def _embedder(value: Any) -> ForkKey:
    """Answers a second embedder of SAT's conditioner, such as ReSim's trajectory encoder."""
    name = value.get("input_key") if isinstance(value, dict) else None
    field = name if isinstance(name, str) and name.isidentifier() else "NAME"
    trained = isinstance(value, dict) and value.get("is_trainable") is True
    what = "trained encoder" if trained else "encoder"
    place = "network module" if trained else "condition"
    return ForkKey(
        "SAT forks such as ReSim",
        f"a second {what}, of the batch's `{field}`",
        f"`data.fields.{field}`, a condition that reads it, and the {what} in a {place}",
    )


def _groups_and_leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields the dotted path of each value; lists count as one, but for lists of groups."""
    if path:
        yield path, value
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = reversed(list(enumerate(value)))  # so that removing one moves none that comes after it
    for key, item in items:
        yield from _groups_and_leaves(item, f"{path}.{key}" if path else str(key))

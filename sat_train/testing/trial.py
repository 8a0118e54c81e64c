"""An extension on a tiny model: the configurations, samples and weights that the laws are tried on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sat_train.config import RunConfig, load_run_config
from sat_train.config.extensions import KEY
from sat_train.config.parts.registry import Params, choices_in, parts_of
from sat_train.config.run import Sections
from sat_train.data.batches import LoadedBatch
from sat_train.distributed.processes import start_single_process
from sat_train.distributed.seeds import derive_generator
from sat_train.encoding.build import build_encoders
from sat_train.encoding.conditions.condition import Encoding
from sat_train.encoding.encode import Encode
from sat_train.encoding.encoded_batch import EncodedBatch
from sat_train.models.build import build_dit
from sat_train.models.dit.transformer import DiffusionTransformer
from sat_train.models.encoders import Encoders
from sat_train.objective.training_inputs import TrainingInputs
from sat_train.objective.video_diffusion import VideoDiffusion
from sat_train.testing.drawn_clips import FPS, FRAMES, Shapes, write_clips
from sat_train.training.models import build_models, find_start_weights
from sat_train.training.run_data import open_data

Results = dict[str, Tensor]

PRESET = "configs/sft.yaml"
ROWS = 5  # no size of a tensor by accident
# Small, without logs, and with steps that move each weight; the words of the author come behind these.
_WORDS = (
    *("args.device=cpu", "args.num_workers=0", "args.warmup=0", "args.lr_decay_style=constant"),
    *("args.lr=1e-2", "args.batch_size=2", "args.log_interval=1", "args.tensorboard=false"),
    "args.keep_last=9",
    *("args.eval_interval=null", "args.valid_video_interval=null", "args.valid_data=null"),
    *(f"data.params.max_num_frames={FRAMES}", f"data.params.fps={FPS}"),
    *("data.params.video_size=[32,32]", "data.params.max_upscale=8"),
)
OTHER_SHAPE = ("data.params.video_size=[32,64]", "data.params.max_num_frames=5")
# Groups of section `model` that an extension and its YAML add to the base.
_ADDED = ("conditions", "modules", "hook_order", "loss_terms", "train", "freeze")
_NOISE = "loss_fn_config.params.noise_config"  # it may name a condition
_MOST_PARAMETERS = 50_000_000


class LawBroken(AssertionError):
    """An extension breaks a law; the message names the culprit."""


class NotApplicable(Exception):
    """The law has nothing to say about this extension; the message says why."""


@dataclass(frozen=True)
class UsedPart:
    """A part of an extension in a configuration.

    Args:
        path: Where it is named.
        settings: Where its settings are.
        record: Their record.
    """

    path: str
    settings: str
    record: type[Params]


@dataclass(frozen=True)
class ExtensionTrial:
    """An extension with YAML that uses it, on a small model with random weights.

    Args:
        extension: Path or name of the extension.
        files: YAML files.
        words: Further words of a command line.
        folder: Empty folder for weights, runs and caches.
        field_shapes: Shapes of fields of numbers, for drawn samples.
    """

    extension: str
    files: tuple[str, ...]
    words: tuple[str, ...]
    folder: Path
    field_shapes: Shapes = field(default_factory=dict)
    _samples: dict[tuple[str, ...], LoadedBatch] = field(default_factory=dict)

    def command(self, *words: str) -> list[str]:
        """Returns the words of a run of the extended model from the weights of the base."""
        own = ("--extension", self.extension, *_WORDS, f"args.train_data=[{self.clips}]", *self.words)
        return [*own, f"args.load={self.weights}", f"args.save={self.folder}/runs", *words]

    @cached_property
    def clips(self) -> Path:
        """Folder of drawn clips, for configurations that name no data."""
        data = self.extended.require_data()
        return write_clips(self.folder / "clips", data.fields, self.field_shapes)

    def config(self, *words: str) -> RunConfig:
        """Returns the configuration of such a run."""
        return load_run_config([PRESET, *self.files], self.command(*words))

    @cached_property
    def extended(self) -> RunConfig:
        """The configuration, without weights to load."""
        words = ["--extension", self.extension, *_WORDS, *self.words]
        config = load_run_config([PRESET, *self.files], words, check_paths=False)
        count = sum(config.spec.parameters().values())
        if count > _MOST_PARAMETERS:
            raise LawBroken(
                f"the YAML files choose a model of {count / 1e6:,.0f} million weights: the laws are tried on "
                "a tiny one, such as the one that is trained when no file chooses a model"
            )
        return config

    @cached_property
    def parts(self) -> tuple[UsedPart, ...]:
        """The parts of the extension that the configuration uses."""
        loaded = {each.name.split(".")[0] for each in self.extended.extensions.loaded}
        used = [
            UsedPart(path, f"{path}.params" if hasattr(choice, "params") else path, record)
            for section in Sections.model_fields
            for path, choice in choices_in(getattr(self.extended, section), section)
            for record in [parts_of(choice.slot)[getattr(choice, choice.key)].params]
        ]
        return tuple(each for each in used if each.record.__module__.split(".")[0] in loaded)

    @cached_property
    def base(self) -> RunConfig:
        """The same configuration without the parts of the extension, conditions, modules and loss terms."""
        tree = self.extended.tree()
        tree.pop(KEY)
        for name in (*_ADDED, _NOISE):
            _remove(tree, ["model", *name.split(".")])
        if self.extended.spec.adapter is None:
            tree["model"]["not_trainable_prefixes"] = []
        tree["data"].pop("fields", None)
        for part in self.parts:
            _remove(tree, part.path.split("."))
        (self.folder / "base.yaml").write_text(json.dumps(tree))
        config = load_run_config([self.folder / "base.yaml"], [], check_paths=False)
        _ = self.extended  # loading the base has unregistered the extension
        return config

    @cached_property
    def weights(self) -> Path:
        """File with random weights of the base, every gate open: zeros would hide what lies behind them."""
        start_single_process()
        dit = build_dit(self.base.spec, device="cpu", dtype=torch.float32, with_adapters=False)
        path = self.folder / "base.safetensors"
        state = dit.state_dict()
        save_file({name: _random(name, tensor) for name, tensor in state.items()}, path)
        return path

    @cached_property
    def encoders(self) -> Encoders:
        """The frozen encoders, loaded once."""
        encoders = build_encoders(self.base, torch.device("cpu"))
        encoders.load()
        return encoders

    def pipeline(self, *words: str) -> VideoDiffusion:
        """Returns the extended model as a new run builds it."""
        return self.built(self.config(*words))

    def built(self, config: RunConfig) -> VideoDiffusion:
        """Returns the model of a configuration as a new run builds it."""
        mesh = start_single_process()
        return build_models(config, mesh, find_start_weights(config, mesh), self.encoders)

    def base_pipeline(self) -> VideoDiffusion:
        """Returns the base with the same weights."""
        words = [f"args.load={self.weights}", f"args.save={self.folder}/runs"]
        return self.built(load_run_config([self.folder / "base.yaml"], words, check_paths=False))

    def samples(self, *words: str) -> LoadedBatch:
        """Returns the first training samples, as pixels and fields."""
        if words not in self._samples:
            mesh = start_single_process()
            data = open_data(self.config(f"args.batch_size={ROWS}", *words), mesh)
            self._samples[words] = next(iter(data.train))
        return self._samples[words]

    def encoded(self, pipeline: VideoDiffusion, *words: str) -> EncodedBatch:
        """Returns the first training samples as a pipeline encodes them."""
        return Encode(self.encoders, pipeline.conditions)(self.samples(*words))


def with_encodings(batch: EncodedBatch, encodings: Mapping[str, Encoding]) -> EncodedBatch:
    """Returns a batch with other encodings of some conditions."""
    return replace(batch, encodings={**batch.encodings, **{name: dict(e) for name, e in encodings.items()}})


def fixed_inputs(pipeline: VideoDiffusion, batch: EncodedBatch) -> TrainingInputs:
    """Returns inputs at timesteps across the schedule, with nothing dropped."""
    last = len(pipeline.alpha_bar) - 1
    timesteps = torch.linspace(last // 4, 3 * last // 4, len(batch.sample_indices)).long()
    return pipeline.validation_inputs(batch, timesteps)


def evaluate(pipeline: VideoDiffusion, inputs: TrainingInputs) -> Results:
    """Returns prediction, loss and the gradient of each weight that trains, by name."""
    predictions: list[Tensor] = []

    def network(*args: Any, **kwargs: Any) -> Any:
        result = pipeline.dit(*args, **kwargs)
        predictions.append(result[0] if isinstance(result, tuple) else result)
        return result

    pipeline.dit.zero_grad(set_to_none=True)
    loss = pipeline.loss(inputs, network=network).loss
    loss.backward()
    trained = [(name, p) for name, p in pipeline.dit.named_parameters() if p.requires_grad]
    gradients = {f"the gradient of {name}": p.grad for name, p in trained if p.grad is not None}
    return {"the prediction": predictions[0].detach(), "the loss": loss.detach(), **gradients}


def added_weights(dit: DiffusionTransformer, base: Mapping[str, Tensor]) -> dict[str, torch.nn.Parameter]:
    """Returns the weights that the base does not have, or has in another shape."""
    return {
        name: parameter
        for name, parameter in dit.named_parameters()
        if name not in base or base[name].shape != parameter.shape
    }


@torch.no_grad()
def open_gates(pipeline: VideoDiffusion, base: Mapping[str, Tensor]) -> None:
    """Adds noise to the weights that the base does not have: what begins at zero now has an effect."""
    for name, parameter in added_weights(pipeline.dit, base).items():
        noise = torch.randn(parameter.shape, generator=derive_generator(1, name))
        parameter.add_(0.05 * noise.to(parameter))


def differing(actual: Results, expected: Results, *, tolerance: float = 0.0) -> str:
    """Returns the first of several results that differs, and by how much; nothing if all are equal.

    Args:
        actual: Results by name; more than expected are ignored.
        expected: What they should be.
        tolerance: Of the largest absolute value of each; 0 compares bits.
    """
    for name, tensor in expected.items():
        if name not in actual:
            return f"{name} is missing"
        if actual[name].shape != tensor.shape:
            return f"{name} has the shape {list(actual[name].shape)}, not {list(tensor.shape)}"
        gap = float((actual[name] - tensor).abs().max())
        size = float(tensor.abs().max())
        is_equal = torch.equal(actual[name], tensor) if not tolerance else gap <= tolerance * max(size, 1e-6)
        if not is_equal:
            return f"{name} differs by {gap:.3g} (its largest value is {size:.3g})"
    return ""


def _random(name: str, tensor: Tensor) -> Tensor:
    noise = torch.randn(tensor.shape, generator=derive_generator(0, name))
    is_norm = tensor.dim() == 1 and name.endswith("weight")
    return (1.0 if is_norm else 0.0) + 0.1 * noise


def _remove(tree: Any, path: list[str]) -> None:
    for key in path[:-1]:
        tree = tree[int(key)] if isinstance(tree, list) else tree.get(key, {})
    if isinstance(tree, dict):
        tree.pop(path[-1], None)

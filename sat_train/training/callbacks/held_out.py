"""Measures the held-out clips: the loss, and the loss with one condition replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sat_train.data.batches import LoadedBatch
from sat_train.data.loader import OrderedLoader
from sat_train.data.partners import PartnerBatches
from sat_train.distributed.processes import ProcessMesh
from sat_train.encoding.conditions.condition import Condition
from sat_train.encoding.conditions.latent_time import pad_in_time
from sat_train.encoding.encode import Encode
from sat_train.encoding.encoded_batch import CLIP, EncodedBatch
from sat_train.engine.engine import TrainEngine
from sat_train.log import get_logger
from sat_train.objective.training_inputs import LossOutput
from sat_train.objective.video_diffusion import VideoDiffusion
from sat_train.training.callbacks.condition_probe import gives_inputs, variants
from sat_train.training.callbacks.validation_loss import ClipNumbers, Measured, measure_clips
from sat_train.training.loop.clip_losses import ClipLosses
from sat_train.training.loop.condition_losses import DROPPED, SHUFFLED, ConditionLosses
from sat_train.training.loop.metrics import ValidationMetrics

log = get_logger(__name__)

_LOSS, _TERM = "loss", "term."
_Pair = tuple[LoadedBatch, LoadedBatch | None]


class HeldOutClips:
    """Measures the held-out clips of a run, the same way each time.

    Args:
        loader: Loader of this rank's clips.
        encode: Encodes them.
        pipeline: The objective.
        engine: The engine around the transformer.
        timesteps: Timesteps at which each clip is measured.
        mesh: The process mesh.
        conditions: The conditions of which the report says what they are worth.
        moves: Whether the report moves them, too.
    """

    def __init__(
        self,
        loader: OrderedLoader,
        encode: Encode,
        pipeline: VideoDiffusion,
        engine: TrainEngine,
        *,
        timesteps: tuple[int, ...],
        mesh: ProcessMesh,
        conditions: Sequence[Condition] = (),
        moves: bool = True,
    ) -> None:
        self._loader, self._encode, self._pipeline, self._engine = loader, encode, pipeline, engine
        self._timesteps, self._mesh = timesteps, mesh
        self._conditions, self._moves = tuple(conditions), moves
        self._is_sorted = False  # which conditions give the network anything is known of the first batch
        self._partners: OrderedLoader | None = None
        if self._conditions:
            self._partners = loader.with_batches(PartnerBatches(loader.batches, loader.dataset.bucket))

    def measure(
        self, step: int, asked_to_stop: Callable[[], bool], *, with_report: bool
    ) -> ValidationMetrics | None:
        """Measures all clips; None when interrupted.

        Args:
            step: Optimizer steps done.
            asked_to_stop: Called before each batch, on all ranks.
            with_report: Whether to report on the conditions.

        Ranks: all.
        """
        tables = measure_clips(
            batches=self._pairs(with_report=with_report),
            measure=self._measure_batch,
            num_samples=self._loader.num_samples,
            mesh=self._mesh,
            asked_to_stop=asked_to_stop,
        )
        if tables is None:
            return None
        terms = {name.removeprefix(_TERM): table for name, table in tables.items() if name.startswith(_TERM)}
        return ValidationMetrics(step, tables[_LOSS], conditions=_by_condition(tables), terms=terms)

    def _pairs(self, *, with_report: bool) -> Iterable[_Pair]:
        """Yields the batches, with the batches of their partners where these are needed."""
        if self._partners is None or not with_report:
            return ((batch, None) for batch in self._loader)
        return zip(self._loader, self._partners, strict=True)

    def _measure_batch(self, pair: _Pair) -> Measured:
        loaded, partners = pair
        batch = self._encode(loaded)  # once for all timesteps
        tables = self._measure_terms(batch)
        if partners is not None:
            batch = batch.to(self._pipeline.device)
            has_other = [a != b for a, b in zip(batch.sample_indices, partners.sample_indices, strict=True)]
            for condition in self._reported(batch):
                tables |= self._replaced(batch, condition, partners, has_other)
        return Measured(loaded.clip_ids, loaded.sample_indices, tables)

    def _measure_terms(self, batch: EncodedBatch) -> dict[str, ClipNumbers]:
        """Measures the loss at each timestep and, where it has several, its terms."""
        outputs = self._outputs(batch, self._timesteps, with_terms=True)
        columns = {_LOSS: [output.loss_b for output in outputs]}
        if len(self._pipeline.terms) > 1:
            columns |= {f"{_TERM}{name}": [o.terms[name] for o in outputs] for name in self._pipeline.terms}
        return {name: ClipNumbers(self._timesteps, torch.stack(c, dim=1)) for name, c in columns.items()}

    def _reported(self, batch: EncodedBatch) -> Sequence[Condition]:
        """Returns the conditions to report on: those that give the network anything."""
        if not self._is_sorted:
            latent_shape = pad_in_time(batch.encodings[CLIP]["mean"], self._pipeline.geometry).shape
            silent = [each for each in self._conditions if not gives_inputs(each, batch, latent_shape)]
            for condition in silent:
                log.info("condition report: %s gives the network no input, it is left out", condition.name)
            self._conditions = tuple(each for each in self._conditions if each not in silent)
            self._is_sorted = True
        return self._conditions

    def _replaced(
        self, batch: EncodedBatch, condition: Condition, partners: LoadedBatch, has_other: Sequence[bool]
    ) -> Iterator[tuple[str, ClipNumbers]]:
        others = self._encode.condition(condition.name, partners)
        changed = variants(batch, condition, others, timesteps=self._timesteps, moves=self._moves)
        for variant in changed:
            losses = self._losses(variant.batch, variant.timesteps)
            counts = has_other if variant.name == SHUFFLED else None
            yield _key(condition.name, variant.name), ClipNumbers(variant.timesteps, losses, counts)

    def _losses(self, batch: EncodedBatch, timesteps: Sequence[int]) -> Tensor:
        """Returns the loss of each clip at each timestep, [b, timesteps]."""
        outputs = self._outputs(batch, timesteps, with_terms=False)
        return torch.stack([output.loss_b for output in outputs], dim=1)

    def _outputs(
        self, batch: EncodedBatch, timesteps: Sequence[int], *, with_terms: bool
    ) -> list[LossOutput]:
        size = len(batch.sample_indices)
        measure = functools.partial(self._pipeline.validation_loss, batch, network=self._engine)
        return [
            measure(timesteps_b=torch.full((size,), timestep), with_terms=with_terms)
            for timestep in timesteps
        ]


def _key(condition: str, variant: str) -> str:
    return f"{condition}/{variant}"


def _by_condition(tables: Mapping[str, ClipLosses]) -> tuple[ConditionLosses, ...]:
    """Collects the tables of each condition."""
    found: dict[str, dict[str, ClipLosses]] = {}
    for key, losses in tables.items():
        condition, slash, variant = key.partition("/")
        if slash:
            found.setdefault(condition, {})[variant] = losses
    return tuple(
        ConditionLosses(name, tables[_LOSS], own.pop(DROPPED), own.pop(SHUFFLED, None), own)
        for name, own in found.items()
    )

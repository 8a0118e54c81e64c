"""Measures the held-out clips: the loss, and the loss with one condition replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sat_train.config.parts.loss_term_parts import DIFFUSION
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
from sat_train.objective.loss_inputs import LossInputs
from sat_train.objective.validation_view import ValidationView
from sat_train.objective.video_diffusion import VideoDiffusion
from sat_train.training.callbacks.alignment import alignment_gains
from sat_train.training.callbacks.condition_probe import gives_inputs, variants
from sat_train.training.callbacks.validation_loss import ClipNumbers, Measured, measure_clips
from sat_train.training.loop.clip_losses import ClipLosses
from sat_train.training.loop.condition_losses import DROPPED, SHUFFLED, ConditionLosses
from sat_train.training.loop.metrics import Picture, ValidationMetrics

log = get_logger(__name__)

_LOSS, _TERM, _VIEW, _ALIGNED = "loss", "term:", "view:", "aligned "
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
        views: The views of the clips by name, each with the number of clips of which it shows pictures.
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
        views: Mapping[str, tuple[ValidationView, int]] | None = None,
        conditions: Sequence[Condition] = (),
        moves: bool = True,
    ) -> None:
        self._loader, self._encode, self._pipeline, self._engine = loader, encode, pipeline, engine
        self._timesteps, self._mesh = timesteps, mesh
        self._views = dict(views or {})
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
        measured = measure_clips(
            batches=self._pairs(with_report=with_report),
            measure=self._measure_batch,
            num_samples=self._loader.num_samples,
            mesh=self._mesh,
            asked_to_stop=asked_to_stop,
        )
        if measured is None:
            return None
        tables = measured.tables
        return ValidationMetrics(
            step,
            tables[_LOSS],
            conditions=_by_condition(tables),
            terms=_named(tables, _TERM),
            views=_named(tables, _VIEW),
            pictures=measured.pictures,
        )

    def _pairs(self, *, with_report: bool) -> Iterable[_Pair]:
        """Yields the batches, with the batches of their partners where these are needed."""
        if self._partners is None or not with_report:
            return ((batch, None) for batch in self._loader)
        return zip(self._loader, self._partners, strict=True)

    def _measure_batch(self, pair: _Pair) -> Measured:
        loaded, partners = pair
        batch = self._encode(loaded)  # once for all timesteps
        tables, pictures = self._seen(batch)
        if partners is not None:
            batch = batch.to(self._pipeline.device)
            has_other = [a != b for a, b in zip(batch.sample_indices, partners.sample_indices, strict=True)]
            for condition in self._reported(batch):
                tables |= self._replaced(batch, condition, partners, has_other)
        return Measured(loaded.clip_ids, loaded.sample_indices, tables, pictures)

    def _seen(self, batch: EncodedBatch) -> tuple[dict[str, ClipNumbers], tuple[Picture, ...]]:
        """Returns the losses of a batch, where it has several terms each of them, and what the views say."""
        columns: dict[str, list[Tensor]] = {}
        pictures: list[Picture] = []
        for timestep in self._timesteps:
            step = self._step(batch, timestep, with_terms=True)
            errors = {name: term.errors(step, name=name) for name, term in self._pipeline.terms.items()}
            columns.setdefault(_LOSS, []).append(errors[DIFFUSION])
            for name, error_b in errors.items() if len(errors) > 1 else ():
                columns.setdefault(f"{_TERM}{name}", []).append(error_b)
            for name, (view, shown) in self._views.items():
                for number, values_b in view.numbers(step).items():
                    columns.setdefault(f"{_VIEW}{name}/{number}", []).append(values_b[: step.num_samples])
                if min(batch.sample_indices) < shown:
                    for title, frames in view.pictures(step).items():
                        pictures += _pictures(batch, shown, name, f"{title}, t={timestep}", frames)
        tables = {name: torch.stack(each, dim=1) for name, each in columns.items()}
        return {name: ClipNumbers(self._timesteps, each) for name, each in tables.items()}, tuple(pictures)

    def _step(self, batch: EncodedBatch, timestep: int, *, with_terms: bool = False) -> LossInputs:
        return self._pipeline.validation_step(
            batch,
            timesteps_b=torch.full((len(batch.sample_indices),), timestep),
            network=self._engine,
            with_terms=with_terms,
            with_outputs=with_terms and bool(self._views),
        )

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
        if self._moves:
            clip = batch.encodings[CLIP]["mean"]
            for move, gains_b in alignment_gains(clip, batch.encodings[condition.name]).items():
                yield _key(condition.name, f"{_ALIGNED}{move}"), ClipNumbers((0,), gains_b[:, None])
        others = self._encode.condition(condition.name, partners)
        changed = variants(batch, condition, others, timesteps=self._timesteps, moves=self._moves)
        for variant in changed:
            losses = self._losses(variant.batch, variant.timesteps)
            counts = has_other if variant.name == SHUFFLED else None
            yield _key(condition.name, variant.name), ClipNumbers(variant.timesteps, losses, counts)

    def _losses(self, batch: EncodedBatch, timesteps: Sequence[int]) -> Tensor:
        """Returns the loss of each clip at each timestep, [b, timesteps]."""
        return torch.stack([_error_b(self._step(batch, timestep)) for timestep in timesteps], dim=1)


def _error_b(step: LossInputs) -> Tensor:
    """Returns the plain error of v of each sample."""
    return step.v_error_b(step.v_pred_btchw)[: step.num_samples]


def _pictures(
    batch: EncodedBatch, shown: int, view: str, title: str, frames_btchw: Tensor
) -> Iterator[Picture]:
    """Yields the frames of the clips that are shown."""
    for index, clip, frames in zip(batch.sample_indices, batch.clip_ids, frames_btchw, strict=False):
        if index < shown:
            assert frames.dtype == torch.uint8, f"view {view}: pictures are {frames.dtype}, not uint8"
            yield Picture(view, index, f"{title}: {clip}", frames.cpu())


def _named(tables: Mapping[str, ClipLosses], prefix: str) -> dict[str, ClipLosses]:
    """Returns the tables whose names begin so, without the prefix."""
    return {key[len(prefix) :]: each for key, each in tables.items() if key.startswith(prefix)}


def _key(condition: str, variant: str) -> str:
    return f"{condition}/{variant}"


def _by_condition(tables: Mapping[str, ClipLosses]) -> tuple[ConditionLosses, ...]:
    """Collects the tables of each condition."""
    found: dict[str, dict[str, ClipLosses]] = {}
    for key, losses in tables.items():
        condition, slash, variant = key.partition("/")
        if slash and not key.startswith((_TERM, _VIEW)):
            found.setdefault(condition, {})[variant] = losses
    reports = []
    for name, own in found.items():
        shuffled, dropped, alignment = own.pop(SHUFFLED, None), own.pop(DROPPED), _named(own, _ALIGNED)
        moved = {move: losses for move, losses in own.items() if not move.startswith(_ALIGNED)}
        reports.append(ConditionLosses(name, tables[_LOSS], dropped, shuffled, moved, alignment))
    return tuple(reports)

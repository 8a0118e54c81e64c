"""Fields of a request: read as those of a clip, with the geometry of the video to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sat_train.config import RunConfig
from sat_train.config.parts.field_parts import FieldConfig
from sat_train.config.parts.reference import field_names
from sat_train.data.batches import VideoSample
from sat_train.data.build import build_field_readers
from sat_train.data.clips.bad_clip import BadClip, one_clip
from sat_train.data.clips.clip_file import read_headers
from sat_train.data.clips.resize import cover_crop
from sat_train.data.fields.reader import FieldReader, SampleGeometry, naming_field, read_fields
from sat_train.data.sources.field_places import place_of
from sat_train.data.sources.records import FieldPlace
from sat_train.errors import DataError
from sat_train.sampling.build import SamplingSettings
from sat_train.sampling.first_frames import request_sample
from sat_train.sampling.prompts import SampleRequest

_ALIGNED = ("video", "mask", "pair")  # kinds that show what the video shows


@dataclass(frozen=True)
class RequestReader:
    """Makes samples of requests, with the fields that the conditions of the model read.

    Args:
        fields: These fields, by name.
        readers: Their readers.
        settings: Settings of the videos.
        fps: Frames of a video per second of its fields.
        max_upscale: Largest factor by which a picture may be enlarged.
        root: Folder from which paths start.
    """

    fields: Mapping[str, FieldConfig]
    readers: Mapping[str, FieldReader]
    settings: SamplingSettings
    fps: float
    max_upscale: float
    root: Path

    def sample(self, request: SampleRequest) -> VideoSample:
        """Returns a request as a sample.

        Raises:
            DataError: It lacks a field that a condition reads, or one cannot be read; the row is named.
        """
        sample = request_sample(request, self.settings)
        self.check(request)
        try:
            places = {
                name: place_of(request.fields[name], each.settings, name, self.root)
                for name, each in self.fields.items()
            }
            with one_clip():
                values = read_fields(self.readers, places, self._geometry(places))
        except (BadClip, DataError) as error:
            detail = error.detail if isinstance(error, BadClip) else error.problem
            raise DataError(f"{request.where}: {detail}") from error
        return replace(sample, fields=values, clip_id=request.where)

    def check(self, request: SampleRequest) -> None:
        """Checks that a request has the fields that the conditions read, before any file is opened.

        Raises:
            DataError: It lacks one.
        """
        if missing := [name for name in self.fields if name not in request.fields]:
            raise DataError(
                f"{request.where} gives no field `{missing[0]}`, which a condition of the model reads",
                expected=f"a JSON line with prompt, {', '.join(self.fields)} in args.input_file (*.jsonl)",
                remedy="give it, or leave the condition out of model.conditions",
            )

    def _geometry(self, places: Mapping[str, FieldPlace]) -> SampleGeometry:
        """Returns the geometry of the video to come: from the start of its fields, cropped as these."""
        target = (self.settings.height, self.settings.width)
        pictures = [name for name in places if self.fields[name].kind in _ALIGNED]
        source = target
        for name in pictures[:1]:
            with naming_field(name, places[name]):
                info = read_headers(places[name].files[0].path)
            source = (info.height, info.width)
        return SampleGeometry(
            times=tuple(frame / self.fps for frame in range(self.settings.num_frames)),
            total=self.settings.num_frames,
            crop=cover_crop(source=source, target=target, max_upscale=self.max_upscale),
            max_upscale=self.max_upscale,
            number_at=lambda moment: round(moment * self.fps),
        )


def read_fields_of_conditions(config: RunConfig) -> Sequence[str]:
    """Returns the names of the fields that sampling needs."""
    choices = config.model.conditions.values()
    needed = (choice.params for choice in choices if not choice.params.training_only)
    return sorted({name for params in needed for name in field_names(params)})


def build_request_reader(config: RunConfig, settings: SamplingSettings) -> RequestReader | None:
    """Builds the reader of the fields that the conditions read; None where they read none."""
    names = read_fields_of_conditions(config)
    if not names:
        return None
    data, readers = config.require_data(), build_field_readers(config)
    file = config.args.input_file
    return RequestReader(
        fields={name: data.fields[name] for name in names},
        readers={name: readers[name] for name in names},
        settings=settings,
        fps=data.params.fps,
        max_upscale=data.params.max_upscale,
        root=Path(file).resolve().parent if file else Path.cwd(),
    )

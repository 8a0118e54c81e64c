"""Fields of text."""

from __future__ import annotations

from sat_train.data.clips.bad_clip import BadClip
from sat_train.data.fields.number_files import read_field_bytes
from sat_train.data.fields.reader import FieldReader, SampleGeometry
from sat_train.data.sources.records import FieldPlace, clean_caption
from sat_train.errors import DataError

_TEXT_BYTES = 1 << 20


class TextField(FieldReader):
    """A text besides the caption."""

    def read(self, place: FieldPlace, geometry: SampleGeometry) -> str:
        """Returns the text, its lines joined by spaces."""
        return self._read(place)

    def describe(self, place: FieldPlace) -> str:
        """Returns nothing that differs from text to text, once it has been read."""
        self._read(place)
        return "a text"

    def _read(self, place: FieldPlace) -> str:
        if place.value is not None:
            return place.value
        try:
            content = read_field_bytes(place.files[0], limit=_TEXT_BYTES).decode("utf-8-sig")
            return clean_caption(content, "this file")
        except UnicodeDecodeError as error:
            raise BadClip("unreadable", f"it is not UTF-8 (byte {error.start})") from None
        except DataError as error:
            raise BadClip("unreadable", error.problem) from None

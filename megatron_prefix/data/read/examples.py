"""Records -> Examples: which texts are compared, whatever the columns are called.

ExampleReader detects the format (see `formats`) from the first record's columns, or is given it.
It renames columns as `--map` asks, and refuses records of another format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prefix.data.read.fields import json_type
from megatron_prefix.data.read.formats import FORMATS, Example, detect_format
from megatron_prefix.errors import InputError

KINDS: dict[type, str] = {str: "text", list: "messages"}
NOT_READ = ("images", "videos", "audios")
COLUMNS = tuple(dict.fromkeys(name for format in FORMATS.values() for name in format.columns))
"""All columns that a format reads; `--map` may give any of them."""

ReaderState = tuple[str, type | None]
"""What a reader has learnt from the records so far: the format, and the type of `chosen`."""


class ExampleReader:
    """Turns records into Examples and holds every record to the format of the first.

    `format` is "auto" (detected from the first record's columns) or one of FORMATS. `columns` maps
    a column's name to the dotted path of its value in the record, see `mapped`.
    """

    def __init__(self, format: str = "auto", columns: Mapping[str, str] | None = None) -> None:
        if format != "auto" and format not in FORMATS:
            raise InputError(f"format {format!r} is not one of auto, {', '.join(FORMATS)}")
        self.format = format
        self._columns = dict(columns or {})
        self._detects = format == "auto"
        self._kind: type | None = None

    @property
    def state(self) -> ReaderState:
        """What the records so far have decided; a reader in another process can take it over."""
        return self.format, self._kind

    @state.setter
    def state(self, state: ReaderState) -> None:
        self.format, self._kind = state

    def read(self, record: dict[str, Any]) -> Example:
        """One Example. Raises InputError (a wrong record) or DegenerateRecord."""
        record = mapped(record, self._columns)
        format = detect_format(record) if self._detects else self.format
        if self.format not in ("auto", format):
            raise InputError(
                f"the columns are those of format {format!r}, but the records before have "
                f"{self.format!r}: build one data set per format"
            )
        for name in NOT_READ:
            if record.get(name):
                raise InputError(
                    f"column {name!r} is not supported: remove the column, or the record"
                )
        kind: type | None = type(record.get("chosen"))
        kind = kind if kind in KINDS else None
        if self._kind and kind and kind is not self._kind:
            raise InputError(
                f"formats are mixed: chosen is {KINDS[kind]}, but in the records before it was "
                f"{KINDS[self._kind]}: build one data set per format"
            )
        try:
            return FORMATS[format].read(record)
        except InputError:  # a wrong record decides nothing for later ones
            format, kind = self.state
            raise
        finally:
            self.state = format, self._kind or kind


def mapped(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with the columns of `--map` added or replaced.

    A path leads into objects by name and into lists by number:

        {"chosen": "answers.0.text"}   {"answers": [{"text": "yes"}]}   -> chosen is "yes"

    Raises InputError if there is nothing at a path.
    """
    if not columns:
        return record
    return {**record, **{name: _value_at(record, path, name) for name, path in columns.items()}}


def _value_at(record: dict[str, Any], path: str, name: str) -> Any:
    value: Any = record
    if path in record:  # the name itself contains a dot
        return record[path]
    for step in path.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise InputError(
                f"--map {name}={path}: there is no {step!r} in {json_type(value)} of this record"
            )
    return value


def parse_columns(texts: list[str]) -> dict[str, str]:
    """["chosen=answers.0"] -> {"chosen": "answers.0"}. Raises InputError for another form."""
    columns: dict[str, str] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            raise InputError(f"--map {text!r} is not COLUMN=PATH, such as chosen=answers.0.text")
        if name not in COLUMNS:
            raise InputError(
                f"--map {text!r}: no format reads a column {name!r}; they read {', '.join(COLUMNS)}"
            )
        if name in columns:
            raise InputError(f"--map gives column {name!r} twice: keep one of them")
        columns[name] = path
    return columns

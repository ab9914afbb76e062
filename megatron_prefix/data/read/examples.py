"""Records -> Examples: which texts are compared, whatever columns they came in.

The formats stand in `formats`. A reader finds the format by the first record's columns, or is
told it, renames columns where `--map` asks for it, and holds all records to one format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prefix.data.read.formats import FORMATS, detect_format
from megatron_prefix.data.read.formats.base import Example
from megatron_prefix.data.read.records import json_type
from megatron_prefix.errors import InputError

KINDS = {str: "text", list: "messages"}
NOT_READ = ("images", "videos", "audios")
COLUMNS = tuple(
    "prompt chosen rejected completion label margin weight score_chosen score_rejected tools "
    "messages rejected_response rejected_messages context completions chosen_response "
    "chosen_reward rejected_reward instruction input history system conversations".split()
)
"""All that formats read, and so what `--map` may give."""


class ExampleReader:
    """Turns records into Examples and holds every record to the format of the first.

    `format` is "auto" (found by the first record's columns) or one of FORMATS. `columns` maps a
    column's name to the dotted path where the record has its value, see `mapped`.
    """

    def __init__(self, format: str = "auto", columns: Mapping[str, str] | None = None) -> None:
        if format != "auto" and format not in FORMATS:
            raise InputError(f"format {format!r} is not one of auto, {', '.join(FORMATS)}")
        self.format = format
        self._columns = dict(columns or {})
        self._found = format == "auto"
        self._kind: type | None = None

    def read(self, record: dict[str, Any]) -> Example:
        """One Example. Raises InputError (a wrong file) or DegenerateRecord."""
        record = mapped(record, self._columns)
        format = detect_format(record) if self._found else self.format
        if self.format not in ("auto", format):
            raise InputError(
                f"the columns are those of format {format!r}, the records before have "
                f"{self.format!r}: build one data set from one format"
            )
        for name in NOT_READ:
            if record.get(name):
                raise InputError(f"column {name!r} is not read: remove it, or the record")
        kind = type(record.get("chosen"))
        if self._kind and kind in KINDS and kind is not self._kind:
            raise InputError(
                f"formats are mixed: chosen is {KINDS[kind]}, in the records before it was "
                f"{KINDS[self._kind]}"
            )
        try:
            return FORMATS[format](record)
        except InputError:
            format, kind = self.format, self._kind  # a wrong record sets no rule for later ones
            raise
        finally:
            self.format, self._kind = format, self._kind or (kind if kind in KINDS else None)


def mapped(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with the named columns put in, or put in place of others.

    A path goes into objects by name and into lists by number:

        {"chosen": "answers.0.text"}   {"answers": [{"text": "yes"}]}   -> chosen is "yes"

    Raises InputError where a path leads nowhere.
    """
    if not columns:
        return record
    return {**record, **{name: _at(record, path, name) for name, path in columns.items()}}


def _at(record: dict[str, Any], path: str, name: str) -> Any:
    value: Any = record
    if path in record:  # a name with a dot in it
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
    """["chosen=answers.0"] -> {"chosen": "answers.0"}; InputError where one is not of that form."""
    columns: dict[str, str] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        if not (name and separator and path):
            raise InputError(f"--map {text!r} is not COLUMN=PATH, as in chosen=answers.0.text")
        if name not in COLUMNS:
            raise InputError(
                f"--map {text!r}: no format reads a column {name!r}; they read {', '.join(COLUMNS)}"
            )
        if name in columns:
            raise InputError(f"--map gives column {name!r} twice")
        columns[name] = path
    return columns

"""`--map`: columns of a record under other names, or from other places.

    {"q": "Hi", "answers": [{"text": "yes", "stars": 5}, {"text": "no", "stars": 1}]}

    prompt=q                                 the column is moved: there is no `q` any more
    chosen=answers.0.text                    names and list positions lead into the record
    completions[].response=answers[].text    every entry of a list
    completions[].score=answers[].stars

A column that a path leads into counts as read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prefix.data.read.fields import json_type
from megatron_prefix.data.read.formats import FORMATS
from megatron_prefix.data.read.pictures import COLUMNS as IMAGE_COLUMNS
from megatron_prefix.errors import InputError

EACH = "[]"
COLUMNS = tuple(dict.fromkeys(name for format in FORMATS.values() for name in format.columns))
"""All columns that a format reads; `--map` may give any of them, and those of images."""
ENTRIES = tuple(dict.fromkeys(name for format in FORMATS.values() for name in format.fields))
"""All fields that a format reads of the entries of a list."""


def mapped(
    record: dict[str, Any], columns: Mapping[str, str]
) -> tuple[dict[str, Any], frozenset[str]]:
    """The record with the columns of `--map`, and the names of the columns they were taken from.

    Raises InputError if there is nothing at a path.
    """
    if not columns:
        return record, frozenset()
    taken = {path if path in record else path.split(".")[0] for path in columns.values()}
    moved = {path for path in columns.values() if path in record and EACH not in path}
    sources = frozenset(name.removesuffix(EACH) for name in taken)
    targets = {name.split(".")[0].removesuffix(EACH) for name in columns}
    rest = {name: value for name, value in record.items() if name not in moved | targets}
    lists: dict[str, list[dict[str, Any]]] = {}
    for name, path in columns.items():
        if EACH not in name:
            rest[name] = _value_at(record, path, name)
            continue
        column, field = name.split(f"{EACH}.")
        values = _values_at(record, path, name)
        entries = lists.setdefault(column, [{} for _ in values])
        if len(entries) != len(values):
            raise InputError(
                f"--map {name}={path}: there are {len(values)} entries, but {len(entries)} of the "
                "path before"
            )
        for entry, value in zip(entries, values, strict=True):
            entry[field] = value
    return {**rest, **lists}, sources - targets


def _values_at(record: dict[str, Any], path: str, name: str) -> list[Any]:
    """The values of a path with [] in it: of every entry of that list."""
    before, _, after = path.partition(EACH)
    items = _value_at(record, before, name)
    if not isinstance(items, list):
        raise InputError(f"--map {name}={path}: {before!r} is {json_type(items)}, not a list")
    return [_value_at(item, after[1:], name) if after else item for item in items]


def _value_at(record: Any, path: str, name: str) -> Any:
    value = record
    if isinstance(record, dict) and path in record:  # the name itself may contain a dot
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
        _check_target(text, name, path)
        if name in columns:
            raise InputError(f"--map gives column {name!r} twice: keep one of them")
        columns[name] = path
    return columns


def _check_target(text: str, name: str, path: str) -> None:
    """Raise InputError for a column or an entry's field that no format reads."""
    column, each, field = name.partition(f"{EACH}.")
    if column not in (*COLUMNS, *IMAGE_COLUMNS):
        known = ", ".join((*COLUMNS, *IMAGE_COLUMNS))
        raise InputError(f"--map {text!r}: no format reads a column {column!r}; they read {known}")
    if bool(each) != (EACH in path) or path.count(EACH) > 1:
        raise InputError(
            f"--map {text!r}: both sides need one [], such as "
            "completions[].response=answers[].text, or none"
        )
    if each and field not in ENTRIES:
        raise InputError(
            f"--map {text!r}: no format reads a field {field!r} of an entry; they read "
            f"{', '.join(ENTRIES)}"
        )

"""Files that are one value: records inside an object, columns instead of records, other tables.

    {"data": [{"prompt": …}, …]}                      the records are in the list
    {"prompt": {"0": …, "1": …}, "chosen": {…}}       columns, as pandas writes by default
    {"columns": […], "index": […], "data": [[…]]}     the same split
    prompt,chosen,rejected                            CSV

Columns are refused with the command that writes records: their types and gaps are not certain.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_prefix.data.read.column_names import changes_text

WRAPPERS = ("data", "rows", "records", "examples", "instances", "items", "samples", "train")
"""Names of an object's list of records."""
SIDE = re.compile("chosen|rejected|response|answer|completion|output")
"""Beginnings of names that only a record has."""
COLUMNS = (
    "the file holds columns, not records: write records, for example with pandas' "
    "to_json(path, orient='records', lines=True)"
)
_HEADER = re.compile(rb'"?[A-Za-z_][\w .-]*"?((?P<separator>[,;\t])"?[A-Za-z_][\w .-]*"?)+')


def records_of(value: Any) -> list[tuple[dict[str, Any] | None, str | None]] | None:
    """The records that one object contains, each with None, or None and what is wrong.

    None if the object is itself a record.
    """
    if not isinstance(value, dict):
        return None
    if _are_columns(value):
        return [(None, COLUMNS)]
    names = [name for name in WRAPPERS if _is_list_of_objects(value.get(name))]
    if not names:
        return None
    if any(changes_text(name) or SIDE.match(name) for name in value if name not in names):
        return None
    lists = [name for name, item in value.items() if _is_list_of_objects(item)]
    if len(lists) > 1:
        problem = f"the file is one object with the lists {', '.join(lists)}: write one per file"
        return [(None, problem)]
    return [(record, None) for record in value[names[0]]]


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


def _are_columns(value: dict[str, Any]) -> bool:
    if {"columns", "data"} <= value.keys() and isinstance(value["columns"], list):
        return True
    columns = list(value.values())
    if not columns:
        return False
    if all(isinstance(column, dict) and column for column in columns):
        return all(name.isdecimal() for column in columns for name in column)
    is_texts = all(isinstance(column, list) and column for column in columns)
    return is_texts and all(isinstance(column[0], str | int | float) for column in columns)


def table_hint(line: bytes, path: str) -> str | None:
    """What to do with a CSV file, whose first line names columns; None for another file."""
    header = _HEADER.fullmatch(line.strip())
    if header is None:
        return None
    return csv_remedy(path, header["separator"] == b"\t", header["separator"].decode())


def csv_remedy(path: str, has_tabs: bool, separator: str = ",") -> str:
    """The command that writes the records of a CSV file as JSON Lines.

    CSV is not read, because it does not tell a text from a number, or "NA" from a gap.
    """
    option = ", sep='\\t'" if has_tabs else f", sep={separator!r}" if separator != "," else ""
    target = re.sub(r"\.(csv|tsv|txt)$", "", path) + ".jsonl"
    return (
        "the file looks like CSV, which is not read: write JSON Lines, for example with python -c "
        f'"import pandas; pandas.read_csv({path!r}{option}).to_json({target!r}, '
        "orient='records', lines=True)\""
    )

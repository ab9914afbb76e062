"""Tables with one message or one response per row -> records.

    message_id, parent_id, role, text, rank    OpenAssistant's messages: all rows of a tree become
                                               the record of format oasst
    prompt, response, helpfulness (or score)   HelpSteer: rows one after another with the same
                                               prompt become a record of format ranked

All rows of OpenAssistant are read before the first tree is complete, in whatever order they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from typing import Any

from megatron_prefix.data.read.column_names import RESPONSE_SCORES, RESPONSE_TEXTS
from megatron_prefix.data.read.fields import json_type
from megatron_prefix.data.read.pictures import COLUMNS as IMAGES
from megatron_prefix.data.read.records import Record
from megatron_prefix.errors import InputError

Value = dict[str, Any]


def joined_rows(records: Iterable[Record], prepare: Callable[[Value], Value]) -> Iterator[Record]:
    """The records of the rows, if the first readable record is a row; else the records as they are.

    `prepare` is applied to the value of each row: it renames and leaves out columns.
    """
    before: list[Record] = []
    records = iter(records)
    for record in records:
        before.append(record)
        first = record.decoded().value
        if first is not None:
            try:
                prepared = prepare(first)
            except InputError:  # reading the record says it again, with its line
                break
            if _is_message_row(prepared):
                return _trees(_prepared(chain(before, records), prepare))
            if _is_response_row(prepared):
                return _groups(_prepared(chain(before, records), prepare))
            break
    return chain(before, records)


def _prepared(records: Iterable[Record], prepare: Callable[[Value], Value]) -> Iterator[Record]:
    for record in records:
        record = record.decoded()
        if record.value is not None:
            try:
                record = record._replace(value=prepare(record.value))
            except InputError as error:
                record = record._replace(value=None, error=str(error))
        yield record


def _is_message_row(value: Value) -> bool:
    return {"message_id", "text", "role"} <= value.keys() and "prompt" not in value


def _is_response_row(value: Value) -> bool:
    is_number = any(type(value.get(name)) in (int, float) for name in RESPONSE_SCORES)
    has_text = any(isinstance(value.get(name), str | list) for name in RESPONSE_TEXTS)
    return "prompt" in value and has_text and is_number and "chosen" not in value


def _trees(rows: Iterator[Record]) -> Iterator[Record]:
    """Every tree as one record, in the order of the rows of their first messages."""
    # Rows 1 (parent none), 3 (parent 2), 2 (parent 1) -> one tree: 1 with the reply 2, which has
    # the reply 3.
    nodes: dict[Any, Value] = {}
    messages: list[tuple[Record, Any]] = []
    wrong: list[Record] = []
    for row in rows:
        id = row.value.get("message_id") if row.value is not None else None
        if row.value is None:
            wrong.append(row)
        elif not isinstance(id, str | int) or id in nodes:
            problem = "occurs twice" if id in nodes else f"is {json_type(id)}, it must be text"
            wrong.append(row._replace(value=None, error=f"'message_id' {problem}"))
        else:
            nodes[id] = {**row.value, "replies": []}
            messages.append((row, nodes[id]))
    roots = []
    for row, node in messages:
        parent = node.get("parent_id")
        if parent is None:
            roots.append((row, node))
        elif parent in nodes:
            nodes[parent]["replies"].append(node)
        else:
            error = f"the message's parent {parent!r} is not among the rows"
            wrong.append(row._replace(value=None, error=error))
    yield from _numbered(
        chain(
            wrong, (row._replace(value={"prompt": node}, rows=_size(node)) for row, node in roots)
        )
    )


def _size(node: Value) -> int:
    """Messages of a tree."""
    count, stack = 0, [node]
    while stack:
        count += 1
        stack += stack.pop()["replies"]
    return count


def _groups(rows: Iterator[Record]) -> Iterator[Record]:
    """Neighbouring rows with the same prompt and images as one record with a list of answers."""

    def records() -> Iterator[Record]:
        for _, group in groupby(rows, key=_prompt_of):
            members = list(group)
            if members[0].value is None:
                yield from members
                continue
            values = [row.value for row in members if row.value is not None]
            shared = ("prompt", *IMAGES)
            answers = [{n: v for n, v in value.items() if n not in shared} for value in values]
            value = {n: v for n, v in values[0].items() if n in shared} | {"answers": answers}
            yield members[0]._replace(value=value, rows=len(values))

    return _numbered(records())


def _prompt_of(row: Record) -> Any:
    """What neighbouring rows of one record share: the prompt, and its images."""
    if row.value is None:
        return row.number, None
    return [row.value.get(name) for name in ("prompt", *IMAGES)]


def _numbered(records: Iterable[Record]) -> Iterator[Record]:
    """The joined records, counted from 0."""
    for number, record in enumerate(records):
        yield record._replace(number=number, is_joined=record.value is not None)

"""Typed access to a record's columns: the value, or an InputError that says what it should be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_prefix.data.records import json_type
from megatron_prefix.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation: role is system, user, assistant or another the template has."""

    role: str
    content: str


Text = str | tuple[Message, ...]


def column(record: dict[str, Any], name: str, *types: type) -> Any:
    """The column `name`, which must be there and of one of `types`."""
    wanted = " or ".join({str: "text", list: "a list", dict: "an object"}[t] for t in types)
    if name not in record:
        raise InputError(f"column {name!r} is missing: it must be {wanted}")
    value = record[name]
    if not isinstance(value, types):
        raise InputError(f"column {name!r} is {json_type(value)}, it must be {wanted}")
    return checked(value, f"column {name!r}") if isinstance(value, str) else value


def checked(text: str, what: str) -> str:
    """`text`, where it has a form in UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} holds half a surrogate pair (character {error.start}), which is no text: "
            "repair the program that cut it, or remove the record"
        ) from error
    return text


def number(record: dict[str, Any], name: str, default: float = math.nan) -> float:
    """The optional numeric column `name`; absent or null is `default`."""
    value = record.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"column {name!r} is {json_type(value)}, it must be a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise InputError(f"column {name!r} is {result}, it must be a finite number")
    return result


def messages(value: list[Any], what: str) -> tuple[Message, ...]:
    """A list of {"role", "content"} objects; `what` names it in errors."""
    turns = []
    for i, item in enumerate(value):
        at = f"{what}, message {i + 1}"
        if not isinstance(item, dict):
            raise InputError(f"{at} is {json_type(item)}, it must be an object")
        for key in ("role", "content"):
            if not isinstance(item.get(key), str):
                raise InputError(f"{at}: {key!r} is {json_type(item.get(key))}, it must be text")
        if item.get("tool_calls"):
            raise InputError(f"{at} has tool_calls, which are not read: remove the record")
        content = checked(item["content"], at)
        turns.append(Message(role=checked(item["role"], at), content=content))
    return tuple(turns)

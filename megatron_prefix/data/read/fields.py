"""Typed access to a record's columns: the value, or an InputError that names the right type."""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_prefix.data.read.texts import Message
from megatron_prefix.errors import InputError

EXTRA = ("tool_calls", "tool_call_id", "name")
"""What chat templates read of a turn besides its role and content."""


def json_type(value: Any) -> str:
    """The type of a JSON value for error messages, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def column(record: dict[str, Any], name: str, *types: type) -> Any:
    """The value of column `name`, which must exist and have one of `types`."""
    value = record.get(name)
    if not isinstance(value, types):
        names: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
        expected = " or ".join(names[t] for t in types)
        actual = f"{json_type(value)}," if name in record else "missing:"
        raise InputError(f"column {name!r} is {actual} it must be {expected}")
    return checked(value, f"column {name!r}") if isinstance(value, str) else value


def checked(text: str, place: str) -> str:
    """`text`, which UTF-8 must be able to write; `place` names it in the error."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} contains half of a surrogate pair (character {error.start}), which is not "
            "valid text: repair the program that cut it, or remove the record"
        ) from error
    return text


def number(record: dict[str, Any], name: str, default: float = math.nan) -> float:
    """The optional numeric column `name`; `default` if it is absent or null."""
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


def rank(record: dict[str, Any]) -> int | None:
    """The optional column `rank`, 0 for the best; None if it is absent or null."""
    value = record.get("rank")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise InputError(
            f"'rank' is {str(value)[:40]}, it must be a whole number from 0 to {(1 << 31) - 1}"
        )
    return value


def json_text(value: Any, place: str) -> str:
    """`value` as compact JSON text; `place` names it in the error."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return checked(text, place)


def message(item: Any, place: str) -> Message:
    """One {"role", "content"} object; `place` names it in errors.

    The content may be absent if the turn calls tools (`tool_calls`, a list).
    """
    if not isinstance(item, dict):
        raise InputError(f"{place} is {json_type(item)}, it must be an object")
    calls = item.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise InputError(f"{place}: 'tool_calls' is {json_type(calls)}, it must be a list")
    role, content = item.get("role"), item.get("content")
    if content is None and calls:
        content = ""
    for key, value in (("role", role), ("content", content)):
        if not isinstance(value, str):
            raise InputError(f"{place}: {key!r} is {json_type(value)}, it must be text")
        checked(value, place)
    more = {key: item[key] for key in EXTRA if item.get(key)}
    extra = json_text(more, place) if more else ""
    return Message(role=str(role), content=str(content), extra=extra)


def messages(value: list[Any], place: str) -> tuple[Message, ...]:
    """A list of {"role", "content"} objects; `place` names it in errors."""
    return tuple(message(item, f"{place}, message {i + 1}") for i, item in enumerate(value))


def tools(record: dict[str, Any]) -> str:
    """The optional column `tools` as JSON text: a list of objects, or the JSON text of one."""
    value = record.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"column 'tools' is text, but not JSON ({error})") from error
    if not value:
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError(
            f"column 'tools' is {json_type(value)}, it must be a list of objects, each with the "
            "JSON schema of a function, or the JSON text of such a list"
        )
    return json_text(value, "column 'tools'")

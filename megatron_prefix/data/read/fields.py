"""Typed access to a record's columns: the value, or an InputError that names the right type."""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_prefix.errors import InputError

MOST = (1 << 31) - 1


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


def optional_text(record: dict[str, Any], name: str) -> str:
    """An optional column of text; "" if it is absent or null."""
    return column(record, name, str) if record.get(name) is not None else ""


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


def whole(value: Any) -> int | None:
    """A whole number, also if it is written 2.0 (as tables with missing numbers do); else None."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def rank(record: dict[str, Any]) -> int | None:
    """The optional column `rank`, 0 for the best; None if it is absent, null or NaN."""
    value = record.get("rank")
    if value is None or value != value:
        return None
    rank = whole(value)
    if rank is None or not 0 <= rank <= MOST:
        raise InputError(f"'rank' is {str(value)[:40]}, it must be a whole number from 0 to {MOST}")
    return rank


def json_text(value: Any, place: str) -> str:
    """`value` as compact JSON text; `place` names it in the error."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return checked(text, place)


def from_json(text: str, place: str) -> Any:
    """The value of a JSON text; `place` names it in the error."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is text, but not JSON ({error})") from error


def tools(record: dict[str, Any]) -> str:
    """The optional column `tools` as JSON text.

    It is a list of objects, or the JSON text of one; an object may be its JSON text.
    """
    value = record.get("tools")
    if isinstance(value, str) and value.strip():
        value = from_json(value, "column 'tools'")
    if not value:
        return ""
    if isinstance(value, list):
        value = [
            from_json(tool, f"column 'tools', entry {i + 1}") if isinstance(tool, str) else tool
            for i, tool in enumerate(value)
        ]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError(
            f"column 'tools' is {json_type(value)}, it must be a list of objects, each with the "
            "JSON schema of a function, or the JSON text of such a list"
        )
    return json_text(value, "column 'tools'")


def template_kwargs(record: dict[str, Any]) -> str:
    """The optional column `chat_template_kwargs` as JSON text: an object, or its JSON text."""
    place = "column 'chat_template_kwargs'"
    value = record.get("chat_template_kwargs")
    if isinstance(value, str) and value.strip():
        value = from_json(value, place)
    if not value:
        return ""
    if not isinstance(value, dict):
        raise InputError(
            f"{place} is {json_type(value)}, it must be an object with the names that the chat "
            'template reads, for example {"enable_thinking": false}'
        )
    return json_text(value, place)

"""Typed access to a record's columns: the value, or an InputError that says what it should be."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from megatron_prefix.data.read.records import json_type
from megatron_prefix.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation: role is system, user, assistant or another the template has.

    `extra` is the JSON text of what else chat templates read of a turn (`EXTRA`), or "".
    """

    role: str
    content: str
    extra: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        more = json.loads(self.extra) if self.extra else {}
        return {"role": self.role, "content": self.content, **more}


Text = str | tuple[Message, ...]
EXTRA = ("tool_calls", "tool_call_id", "name")


def column(record: dict[str, Any], name: str, *types: type) -> Any:
    """The column `name`, which must be there and of one of `types`."""
    value = record.get(name)
    if not isinstance(value, types):
        wanted = " or ".join({str: "text", list: "a list", dict: "an object"}[t] for t in types)
        found = f"{json_type(value)}," if name in record else "missing:"
        raise InputError(f"column {name!r} is {found} it must be {wanted}")
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


def rank(record: dict[str, Any]) -> int | None:
    """The optional column `rank`, 0 the best; absent or null is None."""
    value = record.get("rank")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise InputError(f"'rank' is {str(value)[:40]}, it must be a whole number from 0 on")
    return value


def json_text(value: Any, what: str) -> str:
    """`value` as compact JSON text with a form in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return checked(text, what)


def message(item: Any, at: str) -> Message:
    """One {"role", "content"} object; `at` names it in errors.

    A turn that calls tools (`tool_calls`, a list) may do without content.
    """
    if not isinstance(item, dict):
        raise InputError(f"{at} is {json_type(item)}, it must be an object")
    calls = item.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise InputError(f"{at}: 'tool_calls' is {json_type(calls)}, it must be a list")
    found = {"role": item.get("role"), "content": item.get("content")}
    if found["content"] is None and calls:
        found["content"] = ""
    for key, value in found.items():
        if not isinstance(value, str):
            raise InputError(f"{at}: {key!r} is {json_type(value)}, it must be text")
        checked(value, at)
    more = {key: item[key] for key in EXTRA if item.get(key)}
    return Message(**found, extra=json_text(more, at) if more else "")


def messages(value: list[Any], what: str) -> tuple[Message, ...]:
    """A list of {"role", "content"} objects; `what` names it in errors."""
    return tuple(message(item, f"{what}, message {i + 1}") for i, item in enumerate(value))


def tools(record: dict[str, Any]) -> str:
    """The optional column `tools`, a list of objects or the JSON text of one, as JSON text."""
    value = record.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InputError(f"column 'tools' is text, and not JSON ({error})") from error
    if not value:
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError(
            f"column 'tools' is {json_type(value)}, it must be a list of objects, each with the "
            "JSON schema of a function, or such a list as JSON text"
        )
    return json_text(value, "column 'tools'")

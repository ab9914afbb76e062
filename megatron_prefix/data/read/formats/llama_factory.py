"""The two formats of LLaMA-Factory: alpaca (instruction, input) and ShareGPT (conversations).

{"from": "human", "value": "2 + 2?"}                                  the user
{"from": "gpt", "value": "4"}                                         the assistant
{"from": "function_call", "value": "{"name": …, "arguments": …}"}     the assistant calls a tool
{"from": "observation", "value": "…"}                                 the tool answers
"""

from __future__ import annotations

import json
from typing import Any

from megatron_prefix.data.read.fields import checked, column, json_text, json_type
from megatron_prefix.data.read.formats.base import (
    PAIR_COLUMNS,
    Example,
    Format,
    assistant,
    checked_prompt,
    has,
    has_sides,
    pair_example,
    user,
)
from megatron_prefix.data.read.texts import Message
from megatron_prefix.errors import InputError

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "function_call": "assistant",
}


def _optional(record: dict[str, Any], name: str) -> str:
    """An optional column of text; "" if it is absent or null."""
    return column(record, name, str) if record.get(name) is not None else ""


def _system(record: dict[str, Any]) -> tuple[Message, ...]:
    text = _optional(record, "system")
    return (Message(role="system", content=text),) if text else ()


def _tool_calls(text: str, place: str) -> str:
    """One or several function calls of LLaMA-Factory -> the JSON text for `Message.extra`."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: the function call is not JSON ({error})") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and {"name", "arguments"} <= {*c} for c in calls):
        raise InputError(f"{place}: a function call needs 'name' and 'arguments'")
    tool_calls = [
        {"type": "function", "function": {key: call[key] for key in ("name", "arguments")}}
        for call in calls
    ]
    return json_text({"tool_calls": tool_calls}, place)


def _sharegpt_message(item: Any, place: str) -> Message:
    if not isinstance(item, dict):
        raise InputError(f"{place} is {json_type(item)}, it must be an object")
    for key in ("from", "value"):
        if not isinstance(item.get(key), str):
            raise InputError(f"{place}: {key!r} is {json_type(item.get(key))}, it must be text")
    if item["from"] not in SHAREGPT_ROLES:
        raise InputError(
            f"{place}: 'from' is {item['from']!r}, not one of {', '.join(SHAREGPT_ROLES)}"
        )
    role, text = SHAREGPT_ROLES[item["from"]], checked(item["value"], place)
    if item["from"] == "function_call":
        return Message(role=role, content="", extra=_tool_calls(text, place))
    return Message(role=role, content=text)


def read_sharegpt(record: dict[str, Any]) -> Example:
    """ShareGPT's `conversations`, with one message in `chosen` and one in `rejected`."""
    turns = _system(record) + tuple(
        _sharegpt_message(item, f"conversations, message {i + 1}")
        for i, item in enumerate(column(record, "conversations", list))
    )
    sides = []
    for name in ("chosen", "rejected"):
        message = _sharegpt_message(column(record, name, dict), f"column {name!r}")
        if message.role != "assistant":
            raise InputError(f"column {name!r}: 'from' must be 'gpt' or 'assistant'")
        sides.append((message,))
    return pair_example(record, checked_prompt(turns, "conversations"), *sides)


def read_alpaca(record: dict[str, Any]) -> Example:
    """`instruction` and `input`, joined by a line break, answered by `chosen` and `rejected`.

    `system` comes first, then `history`, a list of [question, answer].
    """
    turns = list(_system(record))
    for i, item in enumerate(record.get("history") or []):
        place = f"history, entry {i + 1}"
        if not (isinstance(item, list) and len(item) == 2 and all(type(x) is str for x in item)):
            raise InputError(
                f"{place} is {json_type(item)}, it must be [question, answer], two texts"
            )
        turns += [user(checked(item[0], place)), *assistant(checked(item[1], place))]
    parts = [column(record, "instruction", str), _optional(record, "input")]
    question = "\n".join(part for part in parts if part)
    if question:
        turns.append(user(question))
    sides = [assistant(column(record, name, str)) for name in ("chosen", "rejected")]
    return pair_example(record, checked_prompt(tuple(turns), "the conversation"), *sides)


SHAREGPT = Format(
    read=read_sharegpt,
    fits=lambda record: has(record, "conversations"),
    columns=("conversations", "system", "chosen", "rejected", *PAIR_COLUMNS),
)
ALPACA = Format(
    read=read_alpaca,
    fits=lambda record: has(record, "instruction") and has_sides(record),
    columns=("instruction", "input", "history", "system", "chosen", "rejected", *PAIR_COLUMNS),
)

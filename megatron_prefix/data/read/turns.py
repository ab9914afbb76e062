"""Conversations in all their layouts -> messages with the roles that chat templates know.

[{"role": "user", "content": "Hi"}]                         TRL, OpenAI, ms-swift
[{"from": "human", "value": "Hi"}]                          ShareGPT
{"role": ["user"], "content": ["Hi"]}                       a table's sequence of objects
{"role": "user", "content": "Hi"}                           one message
{"role": "user", "content": [{"type": "text", "text": "Hi"}]}       text in parts
{"role": "tool_call", "content": "{\"name\": …, \"arguments\": …}"}   the assistant calls a tool
{"from": "function_call", "value": "…"}                     the same in ShareGPT
{"role": "tool_response", …}, {"from": "observation", …}    the tool answers
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_prefix.data.read.fields import checked, from_json, json_text, json_type
from megatron_prefix.data.read.texts import Message, Text
from megatron_prefix.errors import InputError

EXTRA = (
    "tool_calls",
    "tool_call_id",
    "name",
    "reasoning_content",
    "reasoning",
    "thinking",
    "tool_responses",
    "tool_plan",
)
"""What chat templates read of a turn besides its role and content."""
FIELDS = ("role", "content", "from", "value", "function_call", "type", "text", *EXTRA)
"""All fields of a message that are read, and those of the parts of its content."""
IMAGE_PARTS = ("image", "image_url", "input_image")
"""Types of the parts of a message's content that are images."""


class ImagePart(InputError):
    """A content has a part that is an image; pictures.py reads such records."""


CALL_ROLES = ("tool_call", "function_call")
"""Roles of a message whose content is the JSON text of one or several calls."""
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
    **{name: "assistant" for name in CALL_ROLES},
}
"""Other names of roles. A role that is not here is passed on to the chat template."""
SHAREGPT_ROLES = ("system", "user", "assistant", "tool", *ROLES)


def text_or_turns(value: Any, place: str) -> Text:
    """A text as it is, or a conversation in any layout; `place` names it in errors."""
    return checked(value, place) if isinstance(value, str) else turns(value, place)


def turns(value: Any, place: str) -> tuple[Message, ...]:
    """The messages of a conversation: a list of messages, one message, or an object of lists.

    A call of a tool joins the assistant's message before it: ms-swift writes several calls, and
    the text before them, as messages of their own.
    """
    if isinstance(value, dict):
        value = _transposed(value, place) if _is_transposed(value) else [value]
    if not isinstance(value, list):
        raise InputError(f"{place} is {json_type(value)}, it must be a list of messages")
    joined: list[Message] = []
    for i, item in enumerate(value):
        turn, is_call = _turn(item, f"{place}, message {i + 1}")
        if is_call and joined and joined[-1].role == "assistant":
            joined[-1] = _joined(joined[-1], turn)
        else:
            joined.append(turn)
    return tuple(joined)


def _is_transposed(value: dict[str, Any]) -> bool:
    """Whether an object holds a list of roles, so it is a whole conversation.

    {"role": ["user", "assistant"], "content": ["Hi", "Hello"]}
    """
    return isinstance(value.get("role", value.get("from")), list)


def _transposed(value: dict[str, Any], place: str) -> list[dict[str, Any]]:
    lengths = {name: len(items) for name, items in value.items() if isinstance(items, list)}
    if len(lengths) != len(value) or len(set(lengths.values())) > 1:
        raise InputError(
            f"{place} is an object of lists, which must have one entry per message, but the "
            f"lengths are {lengths}"
        )
    rows = zip(*value.values(), strict=True)
    return [
        {name: item for name, item in zip(value, row, strict=True) if item is not None}
        for row in rows
    ]


def is_message(value: Any) -> bool:
    """Whether a value is an object like a message or a transposed conversation."""
    return isinstance(value, dict) and (
        {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()
    )


def begins_with(value: Any, role: str) -> bool:
    """Whether a column's value is a conversation whose first message has this role."""
    if isinstance(value, dict):
        first = value.get("role", value.get("from"))
        first = first[0] if isinstance(first, list) and first else first
    else:
        item = value[0] if isinstance(value, list) and value else None
        first = item.get("role", item.get("from")) if isinstance(item, dict) else None
    return isinstance(first, str) and ROLES.get(first, first) == role


def _turn(item: Any, place: str) -> tuple[Message, bool]:
    """One message, and whether its role says that it is a call of a tool."""
    if not isinstance(item, dict):
        raise InputError(f"{place} is {json_type(item)}, it must be an object")
    in_sharegpt = "from" in item or ("value" in item and "content" not in item)
    role_key, content_key = ("from", "value") if in_sharegpt else ("role", "content")
    role, content = item.get(role_key), item.get(content_key)
    more = _extra(item, place)
    if content is None and more.keys() - {"name", "tool_call_id"}:
        content = ""
    if isinstance(content, list):
        content = _joined_parts(content, place)
    for key, value in ((role_key, role), (content_key, content)):
        if not isinstance(value, str):
            raise InputError(f"{place}: {key!r} is {json_type(value)}, it must be text")
        checked(value, place)
    assert isinstance(role, str) and isinstance(content, str)
    if in_sharegpt and role not in SHAREGPT_ROLES:
        raise InputError(f"{place}: 'from' is {role!r}, not one of {', '.join(SHAREGPT_ROLES)}")
    is_call = role in CALL_ROLES
    if is_call:
        content, more = "", {**more, "tool_calls": _calls(content, place)}
    extra = json_text(more, place) if more else ""
    return Message(role=ROLES.get(role, role), content=content, extra=extra), is_call


def _extra(item: dict[str, Any], place: str) -> dict[str, Any]:
    """The fields EXTRA that a message has."""
    more = {key: item[key] for key in EXTRA if item.get(key)}
    calls = more.get("tool_calls")
    if isinstance(calls, str):
        calls = more["tool_calls"] = from_json(calls, f"{place}: 'tool_calls'")
    if calls is None and isinstance(item.get("function_call"), dict):
        more["tool_calls"] = [{"type": "function", "function": item["function_call"]}]
    elif not isinstance(calls, list | None):
        raise InputError(f"{place}: 'tool_calls' is {json_type(calls)}, it must be a list")
    return more


def _joined_parts(parts: list[Any], place: str) -> str:
    """The text of a content in parts; there must be no other part than texts."""
    texts = []
    for part in parts:
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            if part.get("type", "text") == "text":
                part = part["text"]
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else json_type(part)
            error = ImagePart if kind in IMAGE_PARTS else InputError
            raise error(
                f"{place}: 'content' has a part that is not text but {kind!r}, which is not "
                "supported: remove the part, or the record"
            )
        texts.append(part)
    return "".join(texts)


def _calls(text: str, place: str) -> list[dict[str, Any]]:
    """The JSON text of one or several function calls -> the value of `tool_calls`."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: the function call is not JSON ({error})") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and {"name", "arguments"} <= {*c} for c in calls):
        raise InputError(f"{place}: a function call needs 'name' and 'arguments'")
    return [
        {"type": "function", "function": {key: call[key] for key in ("name", "arguments")}}
        for call in calls
    ]


def _joined(message: Message, call: Message) -> Message:
    """The assistant's message with the calls of the next one."""
    more = json.loads(message.extra) if message.extra else {}
    calls = more.get("tool_calls", []) + json.loads(call.extra)["tool_calls"]
    extra = json_text({**more, "tool_calls": calls}, "tool calls")
    return Message(role=message.role, content=message.content, extra=extra)


SIDES = ("chosen", "rejected", "completion")
CONVERSATIONS = (
    "prompt",
    "messages",
    "rejected_messages",
    "conversations",
    "conversation",
    "trajectory",
    "context",
    "conversation_a",
    "conversation_b",
)


def without_json_texts(record: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The record with JSON texts of conversations decoded, and whether there was one.

    Responses can be JSON by nature, so SIDES are decoded only if all of them are conversations.
    """
    changed = {}
    sides = {name: record[name] for name in SIDES if record.get(name) is not None}
    decoded = {name: _conversation(value) for name, value in sides.items()}
    if all(value is not None for value in decoded.values()):
        changed = decoded
    for name in CONVERSATIONS:
        value = _conversation(record.get(name))
        if value is not None:
            changed[name] = value
    return ({**record, **changed}, True) if changed else (record, False)


def _conversation(value: Any) -> Sequence[Any] | None:
    """The messages that a JSON text holds, or None if it holds something else."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return None
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return None
    items = decoded if isinstance(decoded, list) else [decoded]
    return decoded if items and all(map(is_message, items)) else None

"""What a chat template changes in messages: white space trimmed, order changed, text left out.

This is no error: the model was trained with that template. But it changes what is learned, so
such responses are counted and the summary of the build reports them. It is an error if nothing of a
response is left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from megatron_prefix.data.read import Message
from megatron_prefix.errors import InputError

NOTE_TRIMMED = "responses whose chat template trims white space off messages"
NOTE_MOVED = "responses whose chat template puts messages into another order"
NOTE_LOST = "responses whose chat template leaves out or rewrites messages"
NOTE_TOOLS = "responses whose chat template leaves out the tools"
NOTE_CALLS = "responses whose chat template leaves out tool calls"
NOTE_REASONING = "responses whose chat template leaves out their reasoning"
NOTE_OLD_REASONING = "responses whose chat template leaves out the reasoning of earlier turns"
NOTE_SPECIAL = (
    "responses that spell special tokens, kept as text (--parse-special makes them tokens)"
)
WARNINGS = (
    NOTE_TRIMMED,
    NOTE_MOVED,
    NOTE_LOST,
    NOTE_TOOLS,
    NOTE_CALLS,
    NOTE_REASONING,
    NOTE_SPECIAL,
)
REASONING = ("reasoning_content", "reasoning", "thinking", "tool_plan")
"""Fields of a message with what the assistant thought before it answered."""


def template_changes(messages: Sequence[Message], text: str) -> list[str]:
    """Notes on how `text` differs from the contents of the messages, each at most once.

    The contents must follow each other in `text`: contents ["a", "a"] are in "a, a", not in "a".
    If one is missing, they are looked for again without the white space around them.
    """
    contents = [message.content for message in messages]
    if not _missing(contents, text):
        return []
    missing = _missing([content.strip() for content in contents], text)
    changes = {
        NOTE_TRIMMED: not missing or any(c not in text and c.strip() in text for c in contents),
        NOTE_MOVED: any(content in text for content in missing),
        NOTE_LOST: any(content not in text for content in missing),
    }
    return [note for note, applies in changes.items() if applies]


def _missing(contents: Sequence[str], text: str) -> list[str]:
    """The contents that are not in `text` after those before them."""
    missing, end = [], 0
    for content in contents:
        start = text.find(content, end)
        if start < 0:
            missing.append(content)
        else:
            end = start + len(content)
    return missing


def extra_changes(messages: Sequence[Message], num_prompt: int, text: str) -> list[str]:
    """Notes on tool calls and reasoning that `text` does not contain, each at most once.

    The first `num_prompt` messages are the prompt.
    """
    notes = []
    for i, message in enumerate(messages):
        if not message.extra:
            continue
        more = json.loads(message.extra)
        if not all(name in text for name in _called(more)):
            notes.append(NOTE_CALLS)
        if not all(thought.strip() in text for thought in _thoughts(more)):
            notes.append(NOTE_REASONING if i >= num_prompt else NOTE_OLD_REASONING)
    return list(dict.fromkeys(notes))


def check_written(response: Sequence[Message], text: str) -> None:
    """Raise InputError if nothing of a response is in `text`, which follows the prompt."""
    contents = (message.content.strip() for message in response)
    if any(content and content in text for content in contents):
        return
    own: dict[str, list[str]] = {"its text": [], "its tool calls": [], "its reasoning": []}
    for message in response:
        more = json.loads(message.extra) if message.extra else {}
        parts = [message.content], _called(more), _thoughts(more)
        for words, texts in zip(own.values(), parts, strict=True):
            words += re.findall(r"\w+", " ".join(texts).casefold())
    written = text.casefold()
    every = [word for words in own.values() for word in words]
    if every and not any(word in written for word in every):
        lost = " and ".join(kind for kind, words in own.items() if words)
        raise InputError(
            f"the tokenizer's chat template writes nothing of a response: it leaves out {lost} "
            "(tool calls and reasoning need a template that knows them): give a tokenizer with "
            "such a template, or remove the record"
        )


def _called(more: dict[str, Any]) -> list[str]:
    """The names of the functions that a message calls."""
    calls = [call for call in more.get("tool_calls", []) if isinstance(call, dict)]
    functions = [call.get("function", call) for call in calls]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return [name for name in names if isinstance(name, str)]


def _thoughts(more: dict[str, Any]) -> list[str]:
    return [more[name] for name in REASONING if isinstance(more.get(name), str)]

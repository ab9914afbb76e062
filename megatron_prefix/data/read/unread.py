"""Columns and fields that a format did not read: refused if they can change the text, else listed.

    record {"prompt": …, "chosen": …, "rejected": …, "system": "Be brief.", "id": 7}
    read   prompt, chosen, rejected        -> refused: system could change the text

Without `system`, the build goes on, and its summary lists `id`. A column whose texts are all in the
conversation anyway (as `messages` beside whole dialogues) is listed too. `--ignore-columns system`
lists instead of refusing; a field of messages is named messages.FIELD.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from megatron_prefix.data.read.column_names import QUESTIONS, changes_text, is_media, is_of_image
from megatron_prefix.data.read.formats import Example
from megatron_prefix.data.read.texts import are_dialogues
from megatron_prefix.errors import InputError

OPAQUE = ("tool_calls", "arguments", "tools", "function_call", "tool_responses")
"""Fields whose objects are passed on to the chat template as they are."""
TURN = re.compile("\n\n(?:Human|Assistant|System):")
MESSAGE = "message."
"""What begins the name of a field inside a column."""


class _Given(NamedTuple):
    """What the record became, and by which format."""

    format: str
    example: Example


def unread_names(
    record: dict[str, Any],
    example: Example,
    *,
    format: str,
    read: Collection[str],
    taken: Collection[str],
    fields: Collection[str],
    harmless: Collection[str],
    harmless_fields: Collection[str],
    has_images: bool = False,
) -> list[str]:
    """The names of all columns and fields that were not read, for the summary.

    `read` are the columns that were read, `fields` those of the objects inside them, and `taken`
    the columns that `--map` leads into. Raises InputError for a name that can change the text and
    is not in `harmless` or, as a field, in `harmless_fields`. If images were read, other columns
    about them (such as their paths) are listed.
    """
    names = [name for name in record if name not in read and name not in taken]
    names = [name for name in names if not is_empty(record[name])]
    for name in names:
        if name not in harmless and not (has_images and is_of_image(name)):
            _refuse(name, record, read, _Given(format, example))
    seen: dict[str, Any] = {}
    for name in read:
        if isinstance(record.get(name), list | dict) and name not in OPAQUE:
            seen.update(_unread_fields(record[name], fields))
    for name, value in seen.items():
        if name not in harmless and name not in harmless_fields:
            _refuse_field(name, value, example)
    return names + [f"{MESSAGE}{name}" for name in seen]


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing: null, false, 0, white space, or nothing but such values."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list):
        return all(map(is_empty, value))
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return not value


def _unread_fields(value: Any, fields: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The fields of all objects inside a column that are not among `fields`."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack += item
        elif isinstance(item, dict):
            for name, inner in item.items():
                if name not in fields:
                    if not is_empty(inner):
                        yield name, inner
                elif name not in OPAQUE and isinstance(inner, list | dict):
                    stack.append(inner)


def _texts(value: Any) -> Iterator[str]:
    """The texts of a column, without the roles and types of its messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in ("role", "from", "type"):
                yield from _texts(item)


def _repeats(value: Any, example: Example) -> bool:
    """Whether every text of a value is one of the example's texts, or a turn of them."""
    known: set[str] = set()
    wholes = []
    for response in example.responses:
        if isinstance(response.prompt, str) and isinstance(response.response, str):
            wholes.append(response.prompt + response.response)
            known |= {turn.strip() for turn in TURN.split(wholes[-1])}
            known |= {response.prompt.strip(), response.response.strip()}
        else:
            turns = (*response.prompt, *response.response)
            known |= {turn.content.strip() for turn in turns if not isinstance(turn, str)}
    texts = [text for text in _texts(value) if text.strip()]
    return bool(texts) and all(
        text.strip() in known or (wholes and all(whole.startswith(text) for whole in wholes))
        for text in texts
    )


def _holds_text(value: Any) -> bool:
    return value is True or any(text.strip() for text in _texts(value)) or bool(_objects(value))


def _objects(value: Any) -> bool:
    """Whether there is a value that is no number inside lists and objects."""
    if isinstance(value, dict):
        return any(_objects(item) or isinstance(item, bool) for item in value.values())
    return isinstance(value, list) and any(map(_objects, value))


def _refuse(name: str, record: dict[str, Any], read: Collection[str], given: _Given) -> None:
    """Raise InputError if an unread column can change the text."""
    value, leave_out = record[name], f"leave it out with --ignore-columns {name}"
    if is_media(name):
        if is_of_image(name):
            raise InputError(
                f"column {name!r} may hold images, which are read from a column 'images' or "
                f"'image': read them with --map images={name}, or {leave_out}"
            )
        raise InputError(
            f"column {name!r} is not supported (only texts and images are read): remove the "
            f"record, or {leave_out}"
        )
    if not changes_text(name) or not _holds_text(value) or _repeats(value, given.example):
        return
    flags = _flags(name, record, read, given)
    remedy = f"give it to the model with {flags}" if flags else "write its text into the prompt"
    raise InputError(
        f"column {name!r} can change the text, but format {given.format!r} does not read it: "
        f"{remedy}, or {leave_out}"
    )


def _flags(name: str, record: dict[str, Any], read: Collection[str], given: _Given) -> str:
    """The flags of `--map` that bring a text before the question, or "" if none do.

    The format alpaca reads system, and instruction and input joined by a line break.
    """
    if not isinstance(record[name], str) or given.format not in ("trl", "hh", "question"):
        return ""
    prompt = given.example.responses[0].prompt
    if given.format == "hh":
        is_answer = isinstance(prompt, str) and not are_dialogues(prompt)
        return f"--map instruction={name}" if is_answer else ""
    if given.format == "trl" and not isinstance(prompt, str):
        return ""
    questions = ("prompt",) if given.format == "trl" else QUESTIONS
    question = next(asked for asked in questions if asked in read)
    if "sys" in name.lower():
        system = "" if name in ("system", "system_prompt") else f" --map system={name}"
        return f"--map instruction={question}{system}"
    return f"--map instruction={name} --map input={question}"


def _refuse_field(name: str, value: Any, example: Example) -> None:
    """Raise InputError if an unread field of messages can change the text."""
    leave_out = f"leave it out with --ignore-columns {MESSAGE}{name}"
    if is_media(name):
        raise InputError(
            f"field {name!r} of a message is not supported (only texts, and images as parts of "
            f"the content or in a column, are read): remove the record, or {leave_out}"
        )
    if changes_text(name) and _holds_text(value) and not _repeats(value, example):
        raise InputError(
            f"field {name!r} of a message or entry can change the text, but no chat template is "
            f"given it: write its text into the content, or {leave_out}"
        )

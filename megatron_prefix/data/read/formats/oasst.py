"""OpenAssistant's message trees: every set of ranked siblings is a comparison set."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import Message, checked, column, rank
from megatron_prefix.data.read.formats.base import (
    NO_PAIR,
    NOTE_UNLABELLED,
    DegenerateRecord,
    Example,
    ExampleResponse,
    blank_notes,
    ranked_pairs,
)
from megatron_prefix.data.read.records import json_type
from megatron_prefix.data.tree import Pair
from megatron_prefix.errors import InputError


def _oasst_message(node: Any, at: str) -> Message:
    if not isinstance(node, dict):
        raise InputError(f"{at} is {json_type(node)}, it must be an object")
    for key, types, wanted in (("text", str, "text"), ("replies", list | None, "a list")):
        if not isinstance(node.get(key), types):
            raise InputError(f"{at}: {key!r} is {json_type(node.get(key))}, it must be {wanted}")
    role = {"prompter": "user", "assistant": "assistant"}.get(str(node.get("role")))
    if role is None:
        raise InputError(f"{at}: 'role' is {node.get('role')!r}, it must be prompter or assistant")
    try:
        rank(node)
    except InputError as error:
        raise InputError(f"{at}: {error}") from None
    return Message(role=role, content=checked(node["text"], at))


def read_oasst(record: dict[str, Any]) -> Example:
    """An OpenAssistant message tree: assistant siblings of one parent are a comparison set.

    All pairs of siblings with different ranks are labelled; a message without rank or with only
    ties is no response, though it stands in the prompts below it. Sets come in the order of a
    walk from the root, depth first, siblings in the record's order.
    """
    root = column(record, "prompt", dict)
    first = _oasst_message(root, "prompt")
    if first.role != "user":
        raise InputError("prompt: the first message of a tree must have role prompter")
    responses: list[ExampleResponse] = []
    pairs: list[Pair] = []
    stack, num_sets, num_left_out = [(root, (first,), "prompt")], 0, 0
    while stack:
        node, turns, at = stack.pop()
        replies = node.get("replies") or []
        below = [_oasst_message(r, f"{at}, reply {i + 1}") for i, r in enumerate(replies)]
        siblings = [i for i, message in enumerate(below) if message.role == "assistant"]
        labelled = ranked_pairs([replies[i].get("rank") for i in siblings])
        if labelled and turns[-1].role == "assistant":
            raise InputError(f"{at}: the assistant answers itself: a response needs a prompter")
        index = {}
        for sibling in sorted({side for pair in labelled for side in pair}):
            index[sibling] = len(responses)
            reply = siblings[sibling]
            responses.append(
                ExampleResponse(
                    prompt=turns,
                    response=(below[reply],),
                    set_id=num_sets,
                    rank=replies[reply]["rank"],
                )
            )
        pairs += [Pair(chosen=index[c], rejected=index[r]) for c, r in labelled]
        num_sets += bool(labelled)
        num_left_out += len(siblings) - len(index)
        stack += [
            (reply, (*turns, message), f"{at}, reply {i + 1}")
            for i, (reply, message) in enumerate(zip(replies, below, strict=True))
        ][::-1]
    if not pairs:
        raise DegenerateRecord(NO_PAIR)
    notes = blank_notes([r.response for r in responses]) + (NOTE_UNLABELLED,) * num_left_out
    return Example(responses=tuple(responses), pairs=tuple(pairs), notes=notes)

"""OpenAssistant's message trees: every set of ranked siblings is a comparison set."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import checked, column, json_type, rank
from megatron_prefix.data.read.formats.base import (
    NOTE_UNLABELLED,
    DegenerateRecord,
    Example,
    ExampleResponse,
    Format,
    Reason,
    blank_notes,
    ranked_pairs,
)
from megatron_prefix.data.read.texts import Message
from megatron_prefix.data.read.turns import is_message
from megatron_prefix.data.tree import Pair
from megatron_prefix.errors import InputError


def _oasst_message(node: Any, place: str) -> Message:
    if not isinstance(node, dict):
        raise InputError(f"{place} is {json_type(node)}, it must be an object")
    for key, types, expected in (("text", str, "text"), ("replies", list | None, "a list")):
        if not isinstance(node.get(key), types):
            actual = json_type(node.get(key))
            raise InputError(f"{place}: {key!r} is {actual}, it must be {expected}")
    role = {"prompter": "user", "assistant": "assistant"}.get(str(node.get("role")))
    if role is None:
        raise InputError(
            f"{place}: 'role' is {node.get('role')!r}, it must be prompter or assistant"
        )
    try:
        rank(node)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    return Message(role=role, content=checked(node["text"], place))


def read_oasst(record: dict[str, Any]) -> Example:
    """An OpenAssistant message tree; the assistant's replies to one message are a comparison set.

        prompter "Hi" - assistant "Hello" (rank 0) - prompter "Bye" - assistant "Goodbye"
                      - assistant "What?" (rank 1)

    has the prompt "Hi", the responses "Hello" and "What?", and the pair (0, 1). All siblings with
    different ranks form pairs. "Goodbye" has no rank, so it is no response. A message that forms no
    pair can still be part of the prompts below it. Sets are numbered depth first, siblings in the
    record's order.
    """
    root = column(record, "prompt", dict)
    first = _oasst_message(root, "prompt")
    if first.role != "user":
        raise InputError("prompt: the first message of a tree must have role prompter")
    responses: list[ExampleResponse] = []
    pairs: list[Pair] = []
    stack: list[tuple[dict[str, Any], tuple[Message, ...], str]] = [(root, (first,), "prompt")]
    num_sets, num_left_out = 0, 0
    while stack:
        node, turns, place = stack.pop()
        replies = node.get("replies") or []
        below = [_oasst_message(r, f"{place}, reply {i + 1}") for i, r in enumerate(replies)]
        siblings = [i for i, message in enumerate(below) if message.role == "assistant"]
        ranks = [rank(replies[i]) for i in siblings]
        labelled = ranked_pairs(ranks)
        if labelled and turns[-1].role == "assistant":
            raise InputError(
                f"{place}: the assistant answers itself: a response must follow a prompter's "
                "message"
            )
        index = {}
        for sibling in sorted({side for pair in labelled for side in pair}):
            index[sibling] = len(responses)
            place_in_set = ranks[sibling]
            assert place_in_set is not None, "it is in a pair"
            response = (below[siblings[sibling]],)
            responses.append(
                ExampleResponse(prompt=turns, response=response, set_id=num_sets, rank=place_in_set)
            )
        pairs += [Pair(chosen=index[c], rejected=index[r]) for c, r in labelled]
        num_sets += bool(labelled)
        num_left_out += len(siblings) - len(index)
        stack += [
            (reply, (*turns, message), f"{place}, reply {i + 1}")
            for i, (reply, message) in enumerate(zip(replies, below, strict=True))
        ][::-1]
    if not pairs:
        raise DegenerateRecord(Reason.NO_PAIR)
    notes = blank_notes([r.response for r in responses]) + (NOTE_UNLABELLED,) * num_left_out
    return Example(responses=tuple(responses), pairs=tuple(pairs), notes=notes)


OASST = Format(
    read=read_oasst,
    needs=("prompt",),
    columns=("prompt",),
    fits=lambda record: isinstance(record.get("prompt"), dict) and not is_message(record["prompt"]),
    fields=("text", "role", "rank", "replies"),
)

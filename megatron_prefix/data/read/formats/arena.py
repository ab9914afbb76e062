"""Chatbot Arena: two whole conversations and the winner.

format       conversations                       winner
arena        conversation_a, conversation_b      winner: model_a, model_b, tie …
arena-votes  prompt, response_a, response_b      winner_model_a, winner_model_b, winner_tie
"""

from __future__ import annotations

import json
from typing import Any

from megatron_prefix.data.read.fields import checked, column, whole
from megatron_prefix.data.read.formats.base import (
    PAIR_COLUMNS,
    SYSTEM,
    DegenerateRecord,
    Example,
    Format,
    Reason,
    assistant,
    read_turns,
    user,
    with_system,
)
from megatron_prefix.data.read.formats.choice import LABELS, SIGNED, better_side, has_label
from megatron_prefix.data.read.formats.presence import has
from megatron_prefix.data.read.formats.trl import cut_pair, split_messages
from megatron_prefix.data.read.texts import Message
from megatron_prefix.errors import InputError
from megatron_prefix.text import counted

DIALOGUES = ("conversation_a", "conversation_b")
OUTCOMES = ("winner_model_a", "winner_model_b", "winner_tie")
SIDES = ("response_a", "response_b")


def read_arena(record: dict[str, Any]) -> Example:
    """Two conversations, of which one of LABELS names the better."""
    sides = [with_system(record, read_turns(record, name)) for name in DIALOGUES]
    better = better_side(record, DIALOGUES)
    chosen, rejected = sides[better], sides[1 - better]
    return cut_pair(record, chosen, rejected, *split_messages(chosen, rejected))


def read_arena_votes(record: dict[str, Any]) -> Example:
    """`prompt`, `response_a` and `response_b`: texts of each turn, as a list or its JSON text.

    Both models answer all turns, so the conversations part at the first answer that differs.
    """
    votes = [whole(record.get(name)) for name in OUTCOMES]
    if sorted(votes, key=str) != [0, 0, 1]:
        raise InputError(f"of the columns {', '.join(OUTCOMES)} one must be 1 and the others 0")
    questions = _texts(record, "prompt")
    dialogues = []
    for name in SIDES:
        answers = _texts(record, name)
        if len(answers) != len(questions):
            raise InputError(
                f"column {name!r} has {counted(len(answers), 'turn')}, but 'prompt' has "
                f"{len(questions)}"
            )
        turns: list[Message] = []
        for question, answer in zip(questions, answers, strict=True):
            turns += [user(question), *assistant(answer)]
        dialogues.append(tuple(turns))
    if votes[2]:
        raise DegenerateRecord(Reason.TIE)
    chosen, rejected = dialogues if votes[0] else dialogues[::-1]
    return cut_pair(record, chosen, rejected, *split_messages(chosen, rejected))


def _texts(record: dict[str, Any], name: str) -> list[str]:
    """The texts of each turn; null is an empty answer."""
    value: Any = column(record, name, str, list)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = [value]
    if not isinstance(value, list) or not all(isinstance(text, str | None) for text in value):
        raise InputError(f"column {name!r} must be a list of texts, or the JSON text of one")
    return [checked(text or "", f"column {name!r}") for text in value]


ARENA = Format(
    read=read_arena,
    needs=(*DIALOGUES, "winner"),
    columns=(*DIALOGUES, *LABELS, *SIGNED, *SYSTEM, *PAIR_COLUMNS),
    fits=lambda record: has(record, *DIALOGUES) and has_label(record),
    harmless=("full_conversation",),
)
ARENA_VOTES = Format(
    read=read_arena_votes,
    needs=("prompt", *SIDES, *OUTCOMES),
    columns=("prompt", *SIDES, *OUTCOMES, *PAIR_COLUMNS),
)

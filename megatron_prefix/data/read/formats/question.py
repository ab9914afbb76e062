"""A question in a column of its own, with one chosen and one rejected answer to it.

format    question in                        known from
alpaca    instruction, input, history        LLaMA-Factory
question  question, query, input, …          orca_dpo_pairs, distilabel, stack-exchange-paired
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.column_names import QUESTIONS
from megatron_prefix.data.read.fields import checked, column, json_type, optional_text
from megatron_prefix.data.read.formats.base import (
    PAIR_COLUMNS,
    SYSTEM,
    Example,
    Format,
    as_messages,
    assistant,
    checked_prompt,
    pair_example,
    read_side,
    user,
    with_system,
)
from megatron_prefix.data.read.formats.presence import first_of, has, has_sides, holds_dialogues
from megatron_prefix.data.read.texts import Message
from megatron_prefix.errors import InputError

ANSWERS = (
    ("chosen", "rejected"),
    ("response_j", "response_k"),
    ("response", "rejected_response"),
    ("accepted", "rejected"),
)
"""Names of the chosen and the rejected answer; the first two that a record has count. The others
are those of stack-exchange-paired, of ms-swift with a query, and of code preference pairs."""


def read_alpaca(record: dict[str, Any]) -> Example:
    """`instruction` and `input`, joined by a line break, answered by `chosen` and `rejected`.

    `system` comes first, then `history`, a list of [question, answer].
    """
    parts = [column(record, "instruction", str), optional_text(record, "input")]
    question = "\n".join(part for part in parts if part)
    prompt = with_system(record, conversation(record, question))
    sides = [read_side(record, name) for name in ("chosen", "rejected")]
    _, (chosen, rejected) = as_messages(checked_prompt(prompt, "the conversation"), sides)
    return pair_example(record, prompt, chosen, rejected)


def conversation(record: dict[str, Any], question: str) -> tuple[Message, ...]:
    """The turns of `history`, if there are any, and the question, if it is not empty."""
    turns = []
    history = column(record, "history", list) if record.get("history") else []
    for i, item in enumerate(history):
        place = f"history, entry {i + 1}"
        if not (isinstance(item, list) and len(item) == 2 and all(type(x) is str for x in item)):
            raise InputError(
                f"{place} is {json_type(item)}, it must be [question, answer], two texts"
            )
        turns += [user(checked(item[0], place)), *assistant(checked(item[1], place))]
    return (*turns, user(question)) if question else tuple(turns)


def read_question(record: dict[str, Any]) -> Example:
    """The first of QUESTIONS as the user's message; two of ANSWERS are the assistant's."""
    question = column(record, first_of(record, *QUESTIONS), str)
    prompt = with_system(record, conversation(record, question))
    names = next((names for names in ANSWERS if has(record, *names)), ANSWERS[0])
    sides = [read_side(record, name) for name in names]
    _, (chosen, rejected) = as_messages(checked_prompt(prompt, "the conversation"), sides)
    return pair_example(record, prompt, chosen, rejected)


ALPACA = Format(
    read=read_alpaca,
    needs=("instruction", "chosen", "rejected"),
    columns=("instruction", "input", "history", "chosen", "rejected", *SYSTEM, *PAIR_COLUMNS),
    fits=lambda record: (
        has(record, "instruction") and has_sides(record) and not holds_dialogues(record)
    ),
)
QUESTION = Format(
    read=read_question,
    needs=(
        "|".join(QUESTIONS),
        "|".join(chosen for chosen, _ in ANSWERS),
        "|".join(dict.fromkeys(rejected for _, rejected in ANSWERS)),
    ),
    columns=(
        "history",
        *QUESTIONS,
        *dict.fromkeys(name for names in ANSWERS for name in names),
        *SYSTEM,
        *PAIR_COLUMNS,
    ),
    fits=lambda record: (
        any(isinstance(record.get(name), str) for name in QUESTIONS)
        and (has_sides(record) or any(has(record, *names) for names in ANSWERS))
        and not has(record, "prompt")
        and not holds_dialogues(record)
    ),
)

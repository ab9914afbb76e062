"""Two responses and a column that names the better one: by its side, or by a signed preference.

responses                     label                       known from
response1, response2          overall_preference          HelpSteer3-Preference
response_1, response_2        preference_strength         HelpSteer2, its preferences
response_0, response_1        better_response_id          PKU-SafeRLHF
output_1, output_2            preference                  AlpacaFarm
conversation_a, …_b           winner                      Chatbot Arena, MT-Bench (arena.py)

A tie is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_prefix.data.read.fields import column, json_type, number, optional_text, whole
from megatron_prefix.data.read.formats.base import (
    PAIR_COLUMNS,
    SYSTEM,
    DegenerateRecord,
    Example,
    Format,
    Reason,
    as_messages,
    pair_example,
    read_side,
    read_turns,
    with_system_text,
)
from megatron_prefix.data.read.formats.presence import first_of, has, has_any
from megatron_prefix.data.read.formats.questions import asked
from megatron_prefix.data.read.texts import Text
from megatron_prefix.errors import InputError

STEMS = ("response", "answer", "output", "completion", "generation", "text", "summary")
SUFFIXES = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"))
RESPONSES = tuple(
    (f"{stem}{joint}{first}", f"{stem}{joint}{second}")
    for stem in STEMS
    for joint in ("_", "")
    for first, second in SUFFIXES
)
"""Names of two responses: response_0 and response_1, response1 and response2, answer_a …"""
PROMPTS = ("context", "messages", "prompt", "question", "instruction", "query")
LABELS = (
    "better_response_id",
    "winner",
    "preference",
    "preferred",
    "preferred_response",
    "choice",
    "better",
    "label",
)
"""Columns that name the better side: its suffix (0, 1, a, b), or a name that ends with it."""
SIGNED = ("overall_preference", "preference_strength")
"""Columns with a number: below 0 if the first response is better, above 0 if the second is."""
LETTERS = ("a", "b")
"""The first and the second response, also if their columns have numbers."""
TIES = ("tie", "both", "neither", "equal", "same", "draw")


def responses_of(record: dict[str, Any]) -> tuple[str, str] | None:
    """The names of the two responses that a record has."""
    return next((names for names in RESPONSES if has(record, *names)), None)


def better_side(record: dict[str, Any], names: Sequence[str]) -> int:
    """0 if the first of `names` is better, 1 if the second is. Raises DegenerateRecord for a tie.

    The label "model_b", "B" or 1 means the second of conversation_a and conversation_b.
    """
    label = first_of(record, *SIGNED, *LABELS)
    value = record[label]
    if label in SIGNED:
        return chosen_of(-number(record, label))
    suffixes = [name[-1].lower() for name in names]
    text = str(whole(value)) if whole(value) is not None else str(value).strip().lower()
    if any(text.startswith(tie) for tie in TIES):
        raise DegenerateRecord(Reason.TIE)
    is_name = isinstance(value, str) and len(text) > 1 and not text[-2].isalnum()
    suffix = text[-1:] if is_name or text[:-1] in STEMS else text
    if suffixes[0].isdecimal() and suffix in LETTERS:
        return LETTERS.index(suffix)
    if isinstance(value, bool) or suffix not in suffixes:
        raise InputError(
            f"column {label!r} is {json_type(value)} ({str(value)[:40]!r}), which names neither "
            f"{names[0]} nor {names[1]}: it must end with {' or '.join(suffixes)}, or be a tie; "
            "or move the better response to chosen and the other to rejected"
        )
    return suffixes.index(suffix)


def chosen_of(advantage: float) -> int:
    """The better side by the first response's advantage; a tie or NaN is degenerate."""
    if not advantage or advantage != advantage:
        raise DegenerateRecord(Reason.TIE)
    return int(advantage < 0)


def choice_example(
    record: dict[str, Any],
    prompt: Text,
    names: Sequence[str],
    better: int,
    scores: tuple[str, str] | None = None,
) -> Example:
    """The Example of the responses in two columns; `better` is the number of the chosen one."""
    prompt, sides = as_messages(prompt, [read_side(record, name) for name in names])
    if scores is not None:
        scores = scores[better], scores[1 - better]
    return pair_example(record, prompt, sides[better], sides[1 - better], scores=scores)


def read_choice(record: dict[str, Any]) -> Example:
    """Two responses of RESPONSES after one of PROMPTS; `input` follows an instruction."""
    names = responses_of(record)
    if names is None:
        raise InputError("the two responses are missing: for example response_0 and response_1")
    better = better_side(record, names)
    name = first_of(record, *PROMPTS)
    if not isinstance(record.get(name), str):
        prompt: Text = read_turns(record, name)
    else:
        parts = [column(record, name, str)]
        if name == "instruction":
            parts.append(optional_text(record, "input"))
        prompt = asked("\n".join(part for part in parts if part))
    return choice_example(record, with_system_text(record, prompt), names, better)


def has_label(record: dict[str, Any]) -> bool:
    """Whether a record names the better side, and has no `chosen`."""
    return not has(record, "chosen") and has_any(record, *SIGNED, *LABELS)


CHOICE = Format(
    read=read_choice,
    needs=(
        "|".join(PROMPTS),
        "|".join(first for first, _ in RESPONSES),
        "|".join(second for _, second in RESPONSES),
        "|".join((*LABELS, *SIGNED)),
    ),
    columns=(
        *PROMPTS,
        "input",
        *(name for names in RESPONSES for name in names),
        *LABELS,
        *SIGNED,
        *SYSTEM,
        *PAIR_COLUMNS,
    ),
    fits=lambda record: (
        has_label(record) and responses_of(record) is not None and has_any(record, *PROMPTS)
    ),
)

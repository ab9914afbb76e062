"""What every format makes of a record: an Example, that is responses with prompts, and pairs.

A record that cannot be what its format says raises InputError: the file is wrong. A record that
is well formed but holds nothing to learn from raises DegenerateRecord with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prefix.data.read.fields import Message, Text, number, tools
from megatron_prefix.data.tree import UNRANKED, Pair
from megatron_prefix.errors import InputError

EQUAL = "chosen equals rejected"
NO_COMMON_PROMPT = "no common prompt"
NO_PROMPT_TOKEN = "no prompt token"
NO_RESPONSE_TOKEN = "no response token"
NO_PAIR = "no pair"
DEGENERATE = (EQUAL, NO_COMMON_PROMPT, NO_PROMPT_TOKEN, NO_RESPONSE_TOKEN, NO_PAIR)

NOTE_UNLABELLED = "answers that no other is labelled better or worse than (left out)"
NOTE_BLANK = "responses of white space only (kept)"


class DegenerateRecord(Exception):
    """A well-formed record without anything to compare; the argument is one of DEGENERATE."""


@dataclass(frozen=True, kw_only=True)
class ExampleResponse:
    """One response with the prompt above it, both as text or both as messages."""

    prompt: Text
    response: Text
    set_id: int = 0
    rank: int = UNRANKED
    score: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Example:
    """One group before tokenising: responses in the record's order, chosen first, and pairs.

    Without pairs it holds responses that are judged alone. `tools` is the JSON text of the
    functions that a chat template tells the model of, or "".
    """

    responses: tuple[ExampleResponse, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()
    tools: str = ""


def assistant(text: str) -> tuple[Message, ...]:
    """A response of one message."""
    return (Message(role="assistant", content=text),)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def blank_notes(texts: Sequence[Text]) -> tuple[str, ...]:
    """A note for each response of white space only; a call of a tool is more than that."""
    return (NOTE_BLANK,) * sum(map(_is_blank, texts))


def _is_blank(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return all(not (message.content.strip() or message.extra) for message in text)


def weight(record: dict[str, Any]) -> float:
    """The optional column `weight`, 1 where absent."""
    value = number(record, "weight", 1.0)
    if value <= 0:
        raise InputError(f"column 'weight' is {value}, it must be above 0")
    return value


def pair_example(
    record: dict[str, Any],
    prompt: Text,
    chosen: Text,
    rejected: Text,
    *,
    notes: tuple[str, ...] = (),
    scores: tuple[str, str] = ("score_chosen", "score_rejected"),
) -> Example:
    """The Example of a record with two responses and the optional numeric columns.

    `scores` names the columns with the numbers of chosen and rejected.
    """
    if chosen == rejected:
        raise DegenerateRecord(EQUAL)
    pair = Pair(chosen=0, rejected=1, weight=weight(record), margin=number(record, "margin"))
    sides = zip(scores, (chosen, rejected), strict=True)
    return Example(
        responses=tuple(
            ExampleResponse(prompt=prompt, response=text, rank=rank, score=number(record, score))
            for rank, (score, text) in enumerate(sides)
        ),
        pairs=(pair,),
        notes=notes + blank_notes([chosen, rejected]),
        tools=tools(record),
    )


def ranked_pairs(ranks: Sequence[int | None]) -> list[tuple[int, int]]:
    """(better, worse) of every two siblings with different ranks: [0, None, 1] -> [(0, 2)]."""
    return [
        (i, j) if ranks[i] < ranks[j] else (j, i)
        for i in range(len(ranks))
        for j in range(i + 1, len(ranks))
        if ranks[i] is not None and ranks[j] is not None and ranks[i] != ranks[j]
    ]


def ranked_example(
    record: dict[str, Any],
    prompt: Text,
    responses: Sequence[Text],
    ranks: Sequence[int | None],
    scores: Sequence[float],
) -> Example:
    """All pairs of `responses` with different ranks, the lower rank being better.

    Responses without a pair are left out. Raises DegenerateRecord where none has one.
    """
    labelled = ranked_pairs(ranks)
    if not labelled:
        raise DegenerateRecord(NO_PAIR)
    kept = sorted({side for pair in labelled for side in pair})
    new = {old: i for i, old in enumerate(kept)}
    pair_weight = weight(record)
    return Example(
        responses=tuple(
            ExampleResponse(
                prompt=prompt, response=responses[i], rank=ranks[i], score=float(scores[i])
            )
            for i in kept
        ),
        pairs=tuple(Pair(chosen=new[c], rejected=new[r], weight=pair_weight) for c, r in labelled),
        notes=blank_notes([responses[i] for i in kept])
        + (NOTE_UNLABELLED,) * (len(responses) - len(kept)),
        tools=tools(record),
    )


def checked_prompt(turns: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """The messages of a prompt, which an answer can follow."""
    if not turns:
        raise DegenerateRecord(NO_PROMPT_TOKEN)
    if turns[-1].role == "assistant":
        raise InputError(
            f"{name} ends with the assistant's turn: the response would be a second one; "
            "put that turn into chosen and rejected"
        )
    return turns


def checked_response(turns: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """The messages of a response, the assistant's first."""
    if not turns:
        raise DegenerateRecord(NO_RESPONSE_TOKEN)
    if turns[0].role != "assistant":
        raise InputError(
            f"{name} begins with role {turns[0].role!r}: a response begins with 'assistant'"
        )
    return turns

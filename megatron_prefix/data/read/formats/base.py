"""What every format makes of a record: an Example, that is responses with prompts, and pairs.

A record that does not follow its format raises InputError: the file is wrong. A well-formed
record with nothing to learn from raises DegenerateRecord with a Reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from megatron_prefix.data.read.fields import number, tools
from megatron_prefix.data.read.texts import Message, Text
from megatron_prefix.data.tree import UNRANKED, Pair
from megatron_prefix.errors import InputError


class Reason:
    """Why records, responses and pairs are dropped; the texts are keys of the build's report."""

    EQUAL = "chosen equals rejected"
    NO_COMMON_PROMPT = "no common prompt"
    NO_PROMPT_TOKEN = "no prompt token"
    NO_RESPONSE_TOKEN = "no response token"
    NO_PAIR = "no pair"
    DEGENERATE = (EQUAL, NO_COMMON_PROMPT, NO_PROMPT_TOKEN, NO_RESPONSE_TOKEN, NO_PAIR)
    """Those that `--strict` makes an error: there is nothing to compare."""

    TOO_LONG = "over --max-length"
    TOO_LONG_CUT = "over --max-length with the shortest prompt"
    UNPAIRED = "left without a pair"


NOTE_UNLABELLED = "answers that no other is labelled better or worse than (left out)"
NOTE_BLANK = "responses of white space only (kept)"


class DegenerateRecord(Exception):
    """A well-formed record with nothing to compare; the argument is in Reason.DEGENERATE."""


@dataclass(frozen=True, kw_only=True)
class ExampleResponse:
    """One response with the prompt before it, both as text or both as messages."""

    prompt: Text
    response: Text
    set_id: int = 0
    rank: int = UNRANKED
    score: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Example:
    """One group before tokenising: responses in the record's order, chosen first, and pairs.

    Without pairs, each response is judged alone. `tools` is "" or the JSON text of the functions
    that a chat template shows to the model.
    """

    responses: tuple[ExampleResponse, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()
    tools: str = ""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A registered format: how its records are read and recognised.

    `fits` decides by a record's columns. `columns` are all that `read` may read.
    """

    read: Callable[[dict[str, Any]], Example]
    fits: Callable[[dict[str, Any]], bool]
    columns: tuple[str, ...]


PAIR_COLUMNS = ("margin", "weight", "score_chosen", "score_rejected", "tools")
"""Optional columns that `pair_example` reads."""
RANKED_COLUMNS = ("weight", "tools")
"""Optional columns that `ranked_example` reads."""


def has(record: dict[str, Any], *names: str) -> bool:
    """Whether a record has all these columns, and none of them is null."""
    return all(record.get(name) is not None for name in names)


def has_sides(record: dict[str, Any]) -> bool:
    """Whether a record has a column `chosen` or `rejected`, which may be null."""
    return "chosen" in record or "rejected" in record


def assistant(text: str) -> tuple[Message, ...]:
    """A response of one message."""
    return (Message(role="assistant", content=text),)


def user(text: str) -> Message:
    return Message(role="user", content=text)


def blank_notes(texts: Sequence[Text]) -> tuple[str, ...]:
    """A note for each response of white space only; one that calls a tool is not blank."""
    return (NOTE_BLANK,) * sum(map(_is_blank, texts))


def _is_blank(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return all(not (message.content.strip() or message.extra) for message in text)


def weight(record: dict[str, Any]) -> float:
    """The optional column `weight`; 1 if it is absent."""
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
    """The Example of a record with two responses and the optional columns PAIR_COLUMNS.

    `scores` names the columns with the scores of chosen and rejected.
    """
    if chosen == rejected:
        raise DegenerateRecord(Reason.EQUAL)
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
    ranked = [(i, rank) for i, rank in enumerate(ranks) if rank is not None]
    return [
        (i, j) if rank_i < rank_j else (j, i)
        for (i, rank_i), (j, rank_j) in combinations(ranked, 2)
        if rank_i != rank_j
    ]


def ranked_example(
    record: dict[str, Any],
    prompt: Text,
    responses: Sequence[Text],
    ranks: Sequence[int | None],
    scores: Sequence[float],
) -> Example:
    """The Example of all pairs of `responses` with different ranks; the lower rank is better.

    Responses without a pair are left out. Raises DegenerateRecord if there is no pair.
    """
    labelled = ranked_pairs(ranks)
    if not labelled:
        raise DegenerateRecord(Reason.NO_PAIR)
    rank_of = {i: rank for i, rank in enumerate(ranks) if rank is not None}
    paired = sorted({side for pair in labelled for side in pair})
    new = {old: i for i, old in enumerate(paired)}
    pair_weight = weight(record)
    return Example(
        responses=tuple(
            ExampleResponse(
                prompt=prompt, response=responses[i], rank=rank_of[i], score=float(scores[i])
            )
            for i in paired
        ),
        pairs=tuple(Pair(chosen=new[c], rejected=new[r], weight=pair_weight) for c, r in labelled),
        notes=blank_notes([responses[i] for i in paired])
        + (NOTE_UNLABELLED,) * (len(responses) - len(paired)),
        tools=tools(record),
    )


def checked_prompt(turns: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    """The messages of a prompt, which a response must be able to follow."""
    if not turns:
        raise DegenerateRecord(Reason.NO_PROMPT_TOKEN)
    if turns[-1].role == "assistant":
        raise InputError(
            f"{place} ends with the assistant's turn, so the response would be a second one: "
            "move that turn into chosen and rejected"
        )
    return turns


def checked_response(turns: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    """The messages of a response, the assistant's first."""
    if not turns:
        raise DegenerateRecord(Reason.NO_RESPONSE_TOKEN)
    if turns[0].role != "assistant":
        raise InputError(
            f"{place} begins with role {turns[0].role!r}: a response begins with 'assistant'"
        )
    return turns

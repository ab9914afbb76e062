"""What every format makes of a record: an Example, that is responses with prompts, and pairs.

A record that does not follow its format raises InputError: the file is wrong. A well-formed
record with nothing to learn from raises DegenerateRecord with a Reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from megatron_prefix.data.images import Picture
from megatron_prefix.data.read.fields import (
    column,
    number,
    optional_text,
    template_kwargs,
    tools,
)
from megatron_prefix.data.read.formats.presence import has, has_any
from megatron_prefix.data.read.texts import Message, Text
from megatron_prefix.data.read.turns import FIELDS, text_or_turns, turns
from megatron_prefix.data.tree import MAX_WEIGHT, UNRANKED, Pair
from megatron_prefix.errors import InputError


class Reason:
    """Why records, responses and pairs are dropped; the texts are keys of the build's report."""

    EQUAL = "chosen equals rejected"
    NO_COMMON_PROMPT = "no common prompt"
    NO_PROMPT_TOKEN = "no prompt token"
    NO_RESPONSE_TOKEN = "no response token"
    NO_PAIR = "no pair"
    TIE = "tie (neither response is preferred)"
    CONTRADICTION = "scores equal or against the label (--on-contradiction drop)"
    DEGENERATE = (
        EQUAL,
        NO_COMMON_PROMPT,
        NO_PROMPT_TOKEN,
        NO_RESPONSE_TOKEN,
        NO_PAIR,
        TIE,
        CONTRADICTION,
    )
    """Those that `--strict` makes an error: there is nothing to compare."""

    TOO_LONG = "over --max-length"
    TOO_LONG_CUT = "over --max-length with the shortest prompt"
    TOO_LONG_IMAGES = "over --max-length with images (such prompts are never truncated)"
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
    attributes: tuple[float, ...] = ()
    """A score for each of `--attributes`."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One group before tokenising: responses in the record's order, chosen first, and pairs.

    Without pairs, each response is judged alone. `tools` is "" or the JSON text of the functions
    that a chat template shows to the model; `template_kwargs` is "" or the JSON text of an object
    with other values that the template reads.
    """

    responses: tuple[ExampleResponse, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()
    tools: str = ""
    template_kwargs: str = ""
    images: tuple[Picture, ...] = ()
    """The images of the prompt, in the order of the marks IMAGE in its texts."""


class Reads(dict[str, Any]):
    """A record that remembers which of its columns were read: `reads`.

    Questions about what a record has (`in`, `has`, `first_of`) do not count as reading.
    `attributes` are the fields of responses that `--attributes` names.
    """

    def __init__(self, record: dict[str, Any], attributes: Sequence[str] = ()) -> None:
        super().__init__(record)
        self.reads: set[str] = set()
        self.attributes = tuple(attributes)

    def get(self, name: str, default: Any = None) -> Any:
        self.reads.add(name)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self.reads.add(name)
        return super().__getitem__(name)


@dataclass(frozen=True, kw_only=True)
class Format:
    """A registered format: how its records are read and recognised.

    `needs` are the columns that every record has; "a|b" means one of both. `fits` decides by a
    record's columns; by default, all that it needs must be there and not null. `columns` are all
    that `read` may read, and `fields` all that it may read of the objects inside them. `harmless`
    are columns and fields that are known not to change the texts, in spite of their names.
    """

    read: Callable[[dict[str, Any]], Example]
    needs: tuple[str, ...]
    columns: tuple[str, ...]
    fits: Callable[[dict[str, Any]], bool] | None = None
    fields: tuple[str, ...] = FIELDS
    harmless: tuple[str, ...] = ()

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        return {need: tuple(need.split("|")) for need in self.needs}

    def lacks(self, record: dict[str, Any]) -> list[str]:
        """The columns of `needs` that a record does not have, or that are null."""
        return [need for need, names in self._names.items() if not has_any(record, *names)]

    def accepts(self, record: dict[str, Any]) -> bool:
        """Whether a record is of this format, by its columns."""
        if self.fits is not None:
            return self.fits(record)
        return all(has_any(record, *names) for names in self._names.values())


SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"),
)
"""Columns that may hold the scores of chosen and rejected; the first two with numbers count."""
SYSTEM = ("system", "system_prompt")
"""Columns that may hold the system message."""
RANKED_COLUMNS = ("weight", "beta", "tools", "chat_template_kwargs")
"""Optional columns that `ranked_example` reads."""
PAIR_COLUMNS = ("margin", *SCORES[0], *RANKED_COLUMNS)
"""Optional columns that `pair_example` reads."""


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


def best_and_others(
    record: dict[str, Any], prompt: Text, best: Text, others: Sequence[Text]
) -> Example:
    """The Example of one response that is better than each of several others."""
    ranks = [0] + [1] * len(others)
    return ranked_example(record, prompt, [best, *others], ranks, [math.nan] * len(ranks))


def attributes_of(record: dict[str, Any], item: dict[str, Any]) -> tuple[float, ...]:
    """The scores of `--attributes` that `item`, a response of the record, has; NaN for others."""
    names = record.attributes if isinstance(record, Reads) else ()
    return tuple(number(item, name) for name in names)


def weight(record: dict[str, Any]) -> float:
    """The optional column `weight`; 1 if it is absent."""
    value = number(record, "weight", 1.0)
    if not 0 < value <= MAX_WEIGHT:
        raise InputError(
            f"column 'weight' is {value}, it must be above 0 and at most {MAX_WEIGHT:g}"
        )
    return value


def pair_beta(record: dict[str, Any], num_pairs: int = 1) -> float:
    """The optional column `beta`, the pair's own `loss.beta`; NaN if it is absent."""
    value = number(record, "beta")
    if value <= 0:
        raise InputError(f"column 'beta' is {value}, it must be above 0")
    if value > 0 and num_pairs > 1:
        raise InputError(
            f"column 'beta' belongs to one pair, and the record has {num_pairs}: give each pair a "
            "record of its own (build --merge-prompts joins them again), or leave it out with "
            "--ignore-columns beta"
        )
    return value


def pair_example(
    record: dict[str, Any],
    prompt: Text,
    chosen: Text,
    rejected: Text,
    *,
    notes: tuple[str, ...] = (),
    scores: tuple[str, str] | None = None,
) -> Example:
    """The Example of a record with two responses and the optional columns PAIR_COLUMNS.

    `scores` names the columns with the scores of chosen and rejected (default: one of SCORES).
    """
    if chosen == rejected:
        raise DegenerateRecord(Reason.EQUAL)
    pair = Pair(
        chosen=0,
        rejected=1,
        weight=weight(record),
        margin=number(record, "margin"),
        beta=pair_beta(record),
    )
    sides = zip(scores or score_columns(record), (chosen, rejected), strict=True)
    return Example(
        responses=tuple(
            ExampleResponse(prompt=prompt, response=text, rank=rank, score=number(record, score))
            for rank, (score, text) in enumerate(sides)
        ),
        pairs=(pair,),
        notes=notes + blank_notes([chosen, rejected]),
        tools=tools(record),
        template_kwargs=template_kwargs(record),
    )


def score_columns(record: dict[str, Any]) -> tuple[str, str]:
    """The first names of SCORES under which a record has numbers; by default the first ones."""
    for names in SCORES[1:] if not has(record, *SCORES[0][:1]) else ():
        if all(type(dict.get(record, name)) in (int, float) for name in names):
            return names
    return SCORES[0]


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
    attributes: Sequence[tuple[float, ...]] | None = None,
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
    pair_weight, beta = weight(record), pair_beta(record, len(labelled))
    return Example(
        responses=tuple(
            ExampleResponse(
                prompt=prompt,
                response=responses[i],
                rank=rank_of[i],
                score=float(scores[i]),
                attributes=() if attributes is None else attributes[i],
            )
            for i in paired
        ),
        pairs=tuple(
            Pair(chosen=new[c], rejected=new[r], weight=pair_weight, beta=beta) for c, r in labelled
        ),
        notes=blank_notes([responses[i] for i in paired])
        + (NOTE_UNLABELLED,) * (len(responses) - len(paired)),
        tools=tools(record),
        template_kwargs=template_kwargs(record),
    )


def with_system(record: dict[str, Any], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """A conversation after the system message of a column SYSTEM, if the record has one."""
    prompt = with_system_text(record, turns)
    assert not isinstance(prompt, str)
    return prompt


def with_system_text(record: dict[str, Any], turns: Text) -> Text:
    """A prompt after the system message of a column SYSTEM; a text cannot have one."""
    texts = {name: text for name in SYSTEM if (text := optional_text(record, name))}
    if not texts:
        return turns
    name, text = next(iter(texts.items()))
    if len(set(texts.values())) > 1:
        raise InputError(
            f"columns {' and '.join(texts)} are different system messages: leave out one with "
            f"--ignore-columns {name}"
        )
    if isinstance(turns, str):
        raise InputError(
            f"column {name!r} is a system message, but the prompt is a whole dialogue as text: "
            f"write it into the dialogue, or leave it out with --ignore-columns {name}"
        )
    if turns and turns[0].role == "system":
        if turns[0].content == text:
            return turns
        raise InputError(
            f"column {name!r} and the conversation's first message are two different system "
            f"messages: remove one (--ignore-columns {name} leaves out the column)"
        )
    return (Message(role="system", content=text), *turns)


def as_messages(prompt: Text, responses: Sequence[Text]) -> tuple[Text, list[Text]]:
    """The same texts, all as messages if one of them is: the user asks, the assistant answers."""
    if all(isinstance(text, str) for text in (prompt, *responses)):
        return prompt, list(responses)
    asked = (user(prompt),) if isinstance(prompt, str) else checked_prompt(prompt, "the prompt")
    answers: list[Text] = []
    for text in responses:
        if isinstance(text, str):
            answers.append(assistant(text))
        else:
            answers.append(checked_response(text, "the response"))
    return asked, answers


def read_side(record: dict[str, Any], name: str, *types: type) -> Text:
    """A column with a response: a text, one message, or a list of messages."""
    return text_or_turns(column(record, name, *(types or (str, list, dict))), name)


def read_turns(record: dict[str, Any], name: str) -> tuple[Message, ...]:
    """A column with a conversation, in any layout."""
    return turns(column(record, name, list, dict), name)


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

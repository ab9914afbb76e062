"""Lists of several responses, each an object with its rank or score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_prefix.data.read.fields import column, json_type, number, rank
from megatron_prefix.data.read.formats.base import attributes_of
from megatron_prefix.data.read.texts import Text
from megatron_prefix.data.read.turns import text_or_turns
from megatron_prefix.errors import InputError


class Entries(NamedTuple):
    """Responses with their ranks (0 is best), scores (NaN if there is none) and attributes."""

    responses: list[Text]
    ranks: list[int | None]
    scores: list[float]
    attributes: list[tuple[float, ...]]


def read_entries(
    record: dict[str, Any], name: str, texts: Sequence[str], scores: Sequence[str]
) -> Entries:
    """The objects of column `name`.

    `texts` are the fields that may hold the response, `scores` those that may hold the score; the
    first that an object has counts. If no object has a rank, the ranks follow from the scores.
    Raises InputError if only some have a rank, or if there is neither rank nor score.
    """
    entries = Entries([], [], [], [])
    for i, item in enumerate(column(record, name, list)):
        place = f"{name}, entry {i + 1}"
        if not isinstance(item, dict):
            raise InputError(f"{place} is {json_type(item)}, it must be an object")
        try:
            text = next((field for field in texts if item.get(field) is not None), texts[0])
            value = column(item, text, str, list, dict)
            entries.responses.append(text_or_turns(value, f"{text!r}"))
            entries.ranks.append(rank(item))
            score = next((field for field in scores if item.get(field) is not None), scores[0])
            entries.scores.append(number(item, score))
            entries.attributes.append(attributes_of(record, item))
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    if all(value is None for value in entries.ranks):
        if not all(math.isnan(score) for score in entries.scores):
            return entries._replace(ranks=ranks_of(entries.scores))
    for i, value in enumerate(entries.ranks):
        if value is None:
            raise InputError(
                f"{name}, entry {i + 1}: 'rank' is missing, it must be a whole number from 0 on "
                f"(or no entry has a rank, and each has {' or '.join(scores)})"
            )
    return entries


def ranks_of(scores: Sequence[float]) -> list[int | None]:
    """The ranks of scores, the higher the better; a NaN has none: [4, 2.5, nan] -> [0, 1, None]."""
    best_first = sorted({score for score in scores if not math.isnan(score)}, reverse=True)
    rank_of = {score: rank for rank, score in enumerate(best_first)}
    return [rank_of.get(score) for score in scores]

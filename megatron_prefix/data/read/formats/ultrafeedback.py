"""UltraFeedback: an instruction and the completions of several models, each with a score."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import column, json_type, number
from megatron_prefix.data.read.formats.base import (
    RANKED_COLUMNS,
    SYSTEM,
    Example,
    Format,
    assistant,
    ranked_example,
    user,
    with_system,
)
from megatron_prefix.data.read.formats.entries import ranks_of
from megatron_prefix.errors import InputError

SCORES = ("score", "fine-grained_score", "overall_score")
"""Columns of a completion that may hold its score; the first that it has is used."""


def read_ultrafeedback(record: dict[str, Any]) -> Example:
    """`instruction` and `completions`, each with a `response` and one of SCORES, higher is better.

    Completions without a score form no pair, nor do two with the same score. Ranks follow from
    the scores: scores [4.0, 2.5, 4.0] have the ranks [0, 1, 0].
    """
    prompt = with_system(record, (user(column(record, "instruction", str)),))
    responses, scores = [], []
    for i, item in enumerate(column(record, "completions", list)):
        place = f"completions, entry {i + 1}"
        if not isinstance(item, dict):
            raise InputError(f"{place} is {json_type(item)}, it must be an object")
        try:
            responses.append(assistant(column(item, "response", str)))
            name = next((name for name in SCORES if item.get(name) is not None), SCORES[0])
            scores.append(number(item, name))
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
    return ranked_example(record, prompt, responses, ranks_of(scores), scores)


ULTRAFEEDBACK = Format(
    read=read_ultrafeedback,
    needs=("instruction", "completions"),
    columns=("instruction", "completions", *SYSTEM, *RANKED_COLUMNS),
    fields=("response", *SCORES),
    harmless=(
        "correct_answers",
        "incorrect_answers",
        "custom_system_prompt",
        "principle",
        "critique",
        "annotations",
    ),
)

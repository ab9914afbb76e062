"""OpenAI's webgpt_comparisons: a question and two answers, each with a score (1 to -1)."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import column, number
from megatron_prefix.data.read.formats.base import RANKED_COLUMNS, Example, Format
from megatron_prefix.data.read.formats.choice import choice_example, chosen_of
from megatron_prefix.data.read.formats.questions import asked

ANSWERS = ("answer_0", "answer_1")
SCORES = ("score_0", "score_1")


def read_webgpt(record: dict[str, Any]) -> Example:
    """`question` (its `full_text`, or a text) with two answers; the higher score is better."""
    question = column(record, "question", dict, str)
    text = question if isinstance(question, str) else column(question, "full_text", str)
    better = chosen_of(number(record, SCORES[0]) - number(record, SCORES[1]))
    return choice_example(record, asked(text), ANSWERS, better, SCORES)


WEBGPT = Format(
    read=read_webgpt,
    needs=("question", *ANSWERS, *SCORES),
    columns=("question", *ANSWERS, *SCORES, "margin", *RANKED_COLUMNS),
    fields=("full_text",),
    harmless=("quotes_0", "quotes_1", "tokens_0", "tokens_1", "dataset", "id"),
)

"""Stanford Human Preferences: a post and two comments; `labels` is 1 if comment A is better."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import column, json_type, whole
from megatron_prefix.data.read.formats.base import RANKED_COLUMNS, Example, Format
from megatron_prefix.data.read.formats.choice import choice_example
from megatron_prefix.data.read.formats.questions import asked
from megatron_prefix.errors import InputError

COMMENTS = ("human_ref_A", "human_ref_B")
VOTES = ("score_A", "score_B")


def read_shp(record: dict[str, Any]) -> Example:
    """`history` asks; `human_ref_A` and `human_ref_B` answer, with the scores of their votes."""
    label = whole(record.get("labels"))
    if label not in (0, 1):
        raise InputError(f"column 'labels' is {json_type(record.get('labels'))}, it must be 1 or 0")
    prompt = asked(column(record, "history", str))
    return choice_example(record, prompt, COMMENTS, 1 - label, VOTES)


SHP = Format(
    read=read_shp,
    needs=("history", *COMMENTS, "labels"),
    columns=("history", *COMMENTS, "labels", *VOTES, "margin", *RANKED_COLUMNS),
)

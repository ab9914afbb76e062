"""A question and several answers, each with its rank or score.

prompt, answers: {"answer", "rank"}              Nectar
prompt, responses: {"response", "score"}         the same under other names
prompt, answers: {"response", "helpfulness"}     HelpSteer and HelpSteer2, their rows joined
prompt, responses, scores (or rewards)           two lists of one length
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.column_names import RESPONSE_SCORES, RESPONSE_TEXTS
from megatron_prefix.data.read.fields import column, json_type
from megatron_prefix.data.read.formats.base import (
    RANKED_COLUMNS,
    SYSTEM,
    Example,
    Format,
    as_messages,
    ranked_example,
    read_turns,
    with_system_text,
)
from megatron_prefix.data.read.formats.entries import read_entries
from megatron_prefix.data.read.formats.presence import first_of, has_any, has_sides
from megatron_prefix.data.read.formats.questions import asked
from megatron_prefix.data.read.turns import FIELDS
from megatron_prefix.errors import InputError

PROMPTS = ("prompt", "question", "instruction", "query", "input", "messages", "context")
LISTS = ("answers", "responses", "completions", "generations", "candidates")
PARALLEL = ("scores", "rewards", "ratings", "rating", "ranks")
"""Lists with the score (or rank) of each response, if the responses are a list of texts."""


def read_ranked(record: dict[str, Any]) -> Example:
    """The first of PROMPTS, and the first of LISTS with its texts and its ranks or scores."""
    name = first_of(record, *PROMPTS)
    question = record.get(name)
    if isinstance(question, str):
        prompt = asked(column(record, name, str))
    else:
        prompt = read_turns(record, name)
    prompt = with_system_text(record, prompt)
    entries = read_entries(
        *_with_objects(record, first_of(record, *LISTS)), RESPONSE_TEXTS, RESPONSE_SCORES
    )
    prompt, responses = as_messages(prompt, entries.responses)
    return ranked_example(
        record, prompt, responses, entries.ranks, entries.scores, entries.attributes
    )


def _with_objects(record: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The record with a list of texts and its list of scores as one list of objects."""
    items = column(record, name, list)
    if not items or isinstance(items[0], dict):
        return record, name
    label = first_of(record, *PARALLEL)
    values = column(record, label, list)
    if len(values) != len(items):
        raise InputError(
            f"column {name!r} has {len(items)} entries and {label!r} {len(values)}: each response "
            "needs one"
        )
    for i, item in enumerate(items):
        if not isinstance(item, str | list):
            raise InputError(f"{name}, entry {i + 1} is {json_type(item)}, it must be text")
    key = "rank" if label == "ranks" else "score"
    objects = [{"response": x, key: y} for x, y in zip(items, values, strict=True)]
    return {**record, name: objects}, name


def _is_ranked(record: dict[str, Any]) -> bool:
    items = record.get(first_of(record, *LISTS))
    first = items[0] if isinstance(items, list) and items else None
    labels = PARALLEL if isinstance(first, str | list) else ()
    is_entry = isinstance(first, dict) and any(name in first for name in ("rank", *RESPONSE_SCORES))
    is_labelled = is_entry or any(isinstance(record.get(name), list) for name in labels)
    prompts = has_any(record, *PROMPTS)
    return is_labelled and prompts and not has_sides(record)


RANKED = Format(
    read=read_ranked,
    needs=("|".join(PROMPTS), "|".join(LISTS)),
    columns=(*PROMPTS, *LISTS, *PARALLEL, *SYSTEM, *RANKED_COLUMNS),
    fits=_is_ranked,
    fields=(*FIELDS, *RESPONSE_TEXTS, "rank", *RESPONSE_SCORES),
)

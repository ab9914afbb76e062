"""RLHF-V: an image, and a JSON text with a question and two answers to it."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import column, from_json, json_type
from megatron_prefix.data.read.formats.base import (
    PAIR_COLUMNS,
    Example,
    Format,
    assistant,
    pair_example,
    user,
)
from megatron_prefix.data.read.formats.presence import has_sides
from megatron_prefix.errors import InputError

TEXTS = ("question", "chosen", "rejected")


def read_rlhf_v(record: dict[str, Any]) -> Example:
    """`text` is an object, or its JSON text, with `question`, `chosen` and `rejected`."""
    value = record.get("text")
    texts = from_json(value, "column 'text'") if isinstance(value, str) else value
    if not isinstance(texts, dict):
        raise InputError(
            f"column 'text' holds {json_type(texts)}, it must be an object with {', '.join(TEXTS)}"
        )
    question, chosen, rejected = (column(texts, name, str) for name in TEXTS)
    return pair_example(record, (user(question),), assistant(chosen), assistant(rejected))


def _holds_answers(record: dict[str, Any]) -> bool:
    value = record.get("text")
    if isinstance(value, str):
        return value.lstrip().startswith("{") and all(f'"{name}"' in value for name in TEXTS)
    return isinstance(value, dict) and {*TEXTS} <= value.keys()


RLHF_V = Format(
    read=read_rlhf_v,
    needs=("text",),
    columns=("text", *PAIR_COLUMNS),
    fields=TEXTS,
    fits=lambda record: _holds_answers(record) and not has_sides(record),
)

"""Which columns a record has, and what some of them hold. Asking does not count as reading."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.texts import are_dialogues
from megatron_prefix.data.read.turns import begins_with


def has(record: dict[str, Any], *names: str) -> bool:
    """Whether a record has all these columns, and none of them is null."""
    for name in names:
        if dict.get(record, name) is None:
            return False
    return True


def has_any(record: dict[str, Any], *names: str) -> bool:
    """Whether a record has one of these columns, and it is not null."""
    for name in names:
        if dict.get(record, name) is not None:
            return True
    return False


def has_sides(record: dict[str, Any]) -> bool:
    """Whether a record has a column `chosen` or `rejected`, which may be null."""
    return "chosen" in record or "rejected" in record


def first_of(record: dict[str, Any], *names: str) -> str:
    """The first of these columns that is not empty; else the first that a record has, or none."""
    return next((name for name in names if dict.get(record, name)), None) or next(
        (name for name in names if has(record, name)), names[0]
    )


def holds_dialogues(record: dict[str, Any]) -> bool:
    """Whether `chosen` or `rejected` is a whole dialogue: messages that the assistant does not
    begin, or a text with turns."""
    for side in (dict.get(record, "chosen"), dict.get(record, "rejected")):
        if isinstance(side, str) and are_dialogues(side):
            return True
        if isinstance(side, list | dict) and side and not begins_with(side, "assistant"):
            return True
    return False

"""ms-swift: a whole conversation in `messages`, and the answer or conversation rejected for it."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import column, messages
from megatron_prefix.data.read.formats.base import (
    PAIR_COLUMNS,
    Example,
    Format,
    assistant,
    checked_prompt,
    has,
    pair_example,
)
from megatron_prefix.data.read.formats.trl import cut_pair, split_messages
from megatron_prefix.errors import InputError


def read_swift(record: dict[str, Any]) -> Example:
    """`messages`, which end with the chosen answer.

    `rejected_response` is the text of the rejected answer, or `rejected_messages` is the whole
    other conversation.
    """
    turns = messages(column(record, "messages", list), "messages")
    if has(record, "rejected_messages"):
        if has(record, "rejected_response"):
            raise InputError(
                "columns 'rejected_messages' and 'rejected_response' are both given: keep one"
            )
        others = messages(column(record, "rejected_messages", list), "rejected_messages")
        return cut_pair(record, turns, others, *split_messages(turns, others))
    if not turns or turns[-1].role != "assistant":
        raise InputError("column 'messages' must end with the assistant's turn, the chosen answer")
    rejected = assistant(column(record, "rejected_response", str))
    return pair_example(record, checked_prompt(turns[:-1], "messages"), turns[-1:], rejected)


SWIFT = Format(
    read=read_swift,
    fits=lambda record: (
        has(record, "messages")
        and (has(record, "rejected_response") or has(record, "rejected_messages"))
    ),
    columns=("messages", "rejected_response", "rejected_messages", *PAIR_COLUMNS),
)

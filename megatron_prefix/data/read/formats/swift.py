"""ms-swift: a whole conversation in `messages`, and what stands against its last answer."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import column, messages
from megatron_prefix.data.read.formats.base import Example, assistant, checked_prompt, pair_example
from megatron_prefix.data.read.formats.trl import whole_dialogues
from megatron_prefix.errors import InputError


def read_swift(record: dict[str, Any]) -> Example:
    """`messages` end with the chosen answer.

    `rejected_response` is the text of the answer it was preferred to; `rejected_messages` is the
    whole other conversation.
    """
    turns = messages(column(record, "messages", list), "messages")
    if record.get("rejected_messages") is not None:
        if record.get("rejected_response") is not None:
            raise InputError("columns 'rejected_messages' and 'rejected_response': keep one")
        others = column(record, "rejected_messages", list)
        return whole_dialogues(record, turns, messages(others, "rejected_messages"))
    if not turns or turns[-1].role != "assistant":
        raise InputError("column 'messages' must end with the assistant's turn, the chosen answer")
    rejected = assistant(column(record, "rejected_response", str))
    return pair_example(record, checked_prompt(turns[:-1], "messages"), turns[-1:], rejected)

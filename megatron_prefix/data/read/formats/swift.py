"""ms-swift: a whole conversation in `messages`, and the answer or conversation rejected for it."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import checked, column, json_type
from megatron_prefix.data.read.formats.base import (
    PAIR_COLUMNS,
    SYSTEM,
    Example,
    Format,
    assistant,
    best_and_others,
    checked_prompt,
    checked_response,
    pair_example,
    read_turns,
    with_system,
)
from megatron_prefix.data.read.formats.presence import has
from megatron_prefix.data.read.formats.trl import cut_pair, split_messages
from megatron_prefix.data.read.texts import Message, Text
from megatron_prefix.data.read.turns import turns
from megatron_prefix.errors import InputError


def read_swift(record: dict[str, Any]) -> Example:
    """`messages`, which end with the chosen answer.

    `rejected_response` is the rejected answer: a text in place of the last message, a list of
    messages in place of all after the user's last one, or a list of texts, each of them an answer
    that is worse than the chosen one. Or `rejected_messages` is the whole other conversation.
    """
    conversation = with_system(record, read_turns(record, "messages"))
    if has(record, "rejected_messages"):
        if has(record, "rejected_response"):
            raise InputError(
                "columns 'rejected_messages' and 'rejected_response' are both given: keep one"
            )
        others = with_system(record, read_turns(record, "rejected_messages"))
        return cut_pair(record, conversation, others, *split_messages(conversation, others))
    if not conversation or conversation[-1].role != "assistant":
        raise InputError("column 'messages' must end with the assistant's turn, the chosen answer")
    value = column(record, "rejected_response", str, list)
    if isinstance(value, list) and value and not isinstance(value[0], str):
        cut = _after_last_user(conversation)
        rejected = checked_response(turns(value, "rejected_response"), "rejected_response")
        prompt = checked_prompt(conversation[:cut], "messages")
        return pair_example(record, prompt, conversation[cut:], rejected)
    texts = [value] if isinstance(value, str) else value
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"column 'rejected_response', entry {i + 1} is {json_type(text)}, but the first "
                "one is text: all must be texts, or all messages"
            )
    answers: list[Text] = [assistant(checked(text, "rejected_response")) for text in texts]
    prompt = checked_prompt(conversation[:-1], "messages")
    if len(answers) == 1:
        return pair_example(record, prompt, conversation[-1:], answers[0])
    return best_and_others(record, prompt, conversation[-1:], answers)


def _after_last_user(conversation: tuple[Message, ...]) -> int:
    """Number of messages up to and including the user's last one."""
    return max((i + 1 for i, turn in enumerate(conversation) if turn.role == "user"), default=0)


SWIFT = Format(
    read=read_swift,
    needs=("messages", "rejected_response|rejected_messages"),
    columns=("messages", "rejected_response", "rejected_messages", *SYSTEM, *PAIR_COLUMNS),
)

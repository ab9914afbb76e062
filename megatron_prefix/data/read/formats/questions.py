"""Texts that ask something, in columns of any name -> the prompt of an answer.

"How deep is the sea?"                                   the user's message
"\n\nHuman: Hi\n\nAssistant:"                            text, as in HH-RLHF
"Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nBye"    three messages, as in HelpSteer2
"""

from __future__ import annotations

import re

from megatron_prefix.data.read.formats.base import user
from megatron_prefix.data.read.texts import Message, Text, are_dialogues

_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def asked(text: str) -> Text:
    """A question as the user's message, or the dialogue that a text contains."""
    if are_dialogues(text):
        return text
    first, *parts = _TURN.split(text)
    turns = [user(first)] if first else []
    for role, content in zip(parts[::2], parts[1::2], strict=True):
        turns.append(Message(role=role.lower(), content=content))
    if turns and turns[-1].role == "assistant" and not turns[-1].content:
        turns.pop()  # the turn that the responses continue
    return tuple(turns)

"""The two forms of a text: a plain str, or the messages of a conversation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation.

    `role` is system, user, assistant, or another role that the chat template knows. `extra` is
    "" or the JSON text of what else chat templates read of a turn, such as its tool calls.
    """

    role: str
    content: str
    extra: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        more = json.loads(self.extra) if self.extra else {}
        return {"role": self.role, "content": self.content, **more}


Text = str | tuple[Message, ...]
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""Turn markers of HH-RLHF."""


def are_dialogues(*texts: str) -> bool:
    """Whether one of these plain texts has the turn markers of HH-RLHF."""
    return any(marker in text for text in texts for marker in (HUMAN, ASSISTANT))


def common_prefix(a: str, b: str) -> int:
    """Number of leading characters that two texts share."""
    if a == b:
        return len(a)
    # Invariant: the first `low` characters are the same, and at most `high` are.
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low

"""Shorter prompts for `--overflow truncate-prompt`: the oldest turns lose text, their headers stay.

The turns of a prompt form exchanges: a user's turn with the turns that follow it. System messages
are before them and stay. The oldest text goes first, character by character:

    system S; user "abc", assistant "d"; user "ef"         3 + 1 characters can go

    removed 1   S; user "bc", assistant "d"; user "ef"      inside the oldest user's turn
    removed 3   S; user "ef"                                nothing left of it: the exchange goes
    removed 4   S; user "f"                                 the last turn keeps a character

So a prompt still begins with a user's turn and its header, as the chat template writes it. The
last exchange always stays: its turns lose text one after another, and keep their last character.
Plain texts with turns like HH-RLHF's ("\\n\\nHuman: …") are cut in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_prefix.data.read import Message, Text

SYSTEM_ROLES = ("system", "developer")
_MARKER = re.compile(r"\n\n(Human|User|Assistant|System):[ \t]?")
_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant", "System": "system"}


@dataclass(frozen=True)
class _Turn:
    """A turn of a conversation: `head` is written before its text if it is part of a plain text,
    `message` is the message otherwise."""

    role: str
    text: str
    head: str = ""
    message: Message | None = None

    def without(self, count: int) -> _Turn:
        """The turn without the first `count` characters of its text."""
        return replace(self, text=self.text[count:])


class PromptTurns:
    """A prompt as turns. `room` is how many characters can be removed."""

    def __init__(self, prompt: Text) -> None:
        self._is_text = isinstance(prompt, str)
        turns = _text_turns(prompt) if isinstance(prompt, str) else _message_turns(prompt)
        first = next((i for i, t in enumerate(turns) if t.role not in SYSTEM_ROLES), len(turns))
        self._front = turns[:first]
        self._exchanges: list[list[_Turn]] = []
        for turn in turns[first:]:
            if turn.role == "user" or not self._exchanges:
                self._exchanges.append([])
            self._exchanges[-1].append(turn)
        *older, last = self._exchanges or [[]]
        self.room = sum(len(exchange[0].text) for exchange in older)
        self.room += sum(max(len(turn.text) - 1, 0) for turn in last)

    def shortened(self, count: int) -> Text:
        """The prompt without its `count` oldest characters, at most `room`."""
        exchanges = list(self._exchanges)
        while len(exchanges) > 1 and count and count >= len(exchanges[0][0].text):
            count -= len(exchanges.pop(0)[0].text)
        if len(exchanges) > 1:
            user, *others = exchanges[0]
            exchanges[0] = [user.without(count), *others]
        else:
            exchanges = [_shorter(exchange, count) for exchange in exchanges]
        turns = [*self._front, *(turn for exchange in exchanges for turn in exchange)]
        if self._is_text:
            return "".join(turn.head + turn.text for turn in turns)
        return tuple(_message(turn) for turn in turns)


def has_turns(prompt: Text) -> bool:
    """Whether a prompt is made of turns: messages, or a text with a user's turn."""
    if not isinstance(prompt, str):
        return True
    return any(_ROLES[match[1]] == "user" for match in _MARKER.finditer(prompt))


def _shorter(turns: Sequence[_Turn], count: int) -> list[_Turn]:
    """The turns without their `count` first characters; each keeps its last one."""
    result = []
    for turn in turns:
        own = min(count, max(len(turn.text) - 1, 0))
        count -= own
        result.append(turn.without(own))
    return result


def _message(turn: _Turn) -> Message:
    assert turn.message is not None, "the turns of a conversation are messages"
    return replace(turn.message, content=turn.text)


def _message_turns(prompt: tuple[Message, ...]) -> list[_Turn]:
    return [_Turn(message.role, message.content, message=message) for message in prompt]


def _text_turns(prompt: str) -> list[_Turn]:
    """ "S\\n\\nHuman: Hi\\n\\nAssistant:" -> "S"; "\\n\\nHuman: ", "Hi"; "\\n\\nAssistant:", ""."""
    matches = list(_MARKER.finditer(prompt))
    starts = [match.start() for match in matches]
    turns = [_Turn("system", prompt[: starts[0]])] if starts and starts[0] else []
    for match, end in zip(matches, [*starts[1:], len(prompt)], strict=True):
        turns.append(_Turn(_ROLES[match[1]], prompt[match.end() : end], head=match[0]))
    return turns

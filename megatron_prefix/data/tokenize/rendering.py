"""What a chat template does to messages beside writing them: trimmed, moved, left out.

A template that does so is no error: it is how the model was trained. But it changes what is
learned, so every response concerned is counted, and the summary says it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prefix.data.read.fields import Message

NOTE_TRIMMED = "responses whose chat template trims white space off messages"
NOTE_MOVED = "responses whose chat template puts messages into another order"
NOTE_LOST = "responses whose chat template leaves out or rewrites messages"
NOTE_TOOLS = "responses whose chat template leaves out the tools"
NOTE_SPECIAL = (
    "responses that spell special tokens, kept as text (--parse-special makes them tokens)"
)
WARNINGS = (NOTE_TRIMMED, NOTE_MOVED, NOTE_LOST, NOTE_TOOLS, NOTE_SPECIAL)


def template_changes(messages: Sequence[Message], text: str) -> list[str]:
    """Notes on how `text` differs from the messages' contents in their order, each at most once.

    Contents are looked for one behind the other, so a repeated one must stand there twice; where
    that fails, without the white space around them.
    """
    contents = [message.content for message in messages]
    if not _missing(contents, text):
        return []
    missing = _missing([content.strip() for content in contents], text)
    found = {
        NOTE_TRIMMED: not missing or any(c not in text and c.strip() in text for c in contents),
        NOTE_MOVED: any(content in text for content in missing),
        NOTE_LOST: any(content not in text for content in missing),
    }
    return [note for note, holds in found.items() if holds]


def _missing(contents: Sequence[str], text: str) -> list[str]:
    """The contents that do not stand in `text` behind those before them."""
    missing, at = [], 0
    for content in contents:
        found = text.find(content, at)
        if found < 0:
            missing.append(content)
        else:
            at = found + len(content)
    return missing

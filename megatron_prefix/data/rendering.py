"""What a chat template does to messages beside writing them: trimmed, moved, left out.

A template that does so is no error: it is how the model was trained. But it changes what is
learned, so every response concerned is counted, and the summary says it.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prefix.data.fields import Message

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

    Contents are looked for one behind the other, so a repeated one must stand there twice.
    """
    notes: dict[str, None] = {}
    at = 0
    for message in messages:
        content = message.content
        found = text.find(content, at)
        if found < 0 and (stripped := content.strip()) != content:
            notes[NOTE_TRIMMED] = None
            content = stripped
            found = text.find(content, at)
        if found >= 0:
            at = found + len(content)
        else:
            notes[NOTE_MOVED if content in text else NOTE_LOST] = None
    return list(notes)

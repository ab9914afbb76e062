"""What a chat template changes in messages: white space trimmed, order changed, text left out.

This is no error: the model was trained with that template. But it changes what is learned, so
such responses are counted and the summary of the build reports them.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prefix.data.read import Message

NOTE_TRIMMED = "responses whose chat template trims white space off messages"
NOTE_MOVED = "responses whose chat template puts messages into another order"
NOTE_LOST = "responses whose chat template leaves out or rewrites messages"
NOTE_TOOLS = "responses whose chat template leaves out the tools"
NOTE_SPECIAL = (
    "responses that spell special tokens, kept as text (--parse-special makes them tokens)"
)
WARNINGS = (NOTE_TRIMMED, NOTE_MOVED, NOTE_LOST, NOTE_TOOLS, NOTE_SPECIAL)


def template_changes(messages: Sequence[Message], text: str) -> list[str]:
    """Notes on how `text` differs from the contents of the messages, each at most once.

    The contents must follow each other in `text`: contents ["a", "a"] are in "a, a", not in "a".
    If one is missing, they are looked for again without the white space around them.
    """
    contents = [message.content for message in messages]
    if not _missing(contents, text):
        return []
    missing = _missing([content.strip() for content in contents], text)
    changes = {
        NOTE_TRIMMED: not missing or any(c not in text and c.strip() in text for c in contents),
        NOTE_MOVED: any(content in text for content in missing),
        NOTE_LOST: any(content not in text for content in missing),
    }
    return [note for note, applies in changes.items() if applies]


def _missing(contents: Sequence[str], text: str) -> list[str]:
    """The contents that are not in `text` after those before them."""
    missing, end = [], 0
    for content in contents:
        start = text.find(content, end)
        if start < 0:
            missing.append(content)
        else:
            end = start + len(content)
    return missing

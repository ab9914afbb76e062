"""A conversation in a column of its own, with one chosen and one rejected answer to it.

format         conversation in                    known from
sharegpt       conversations, conversation        LLaMA-Factory, ShareGPT
messages       messages                           LLaMA-Factory's openai tags, Axolotl, OpenRLHF
ultrainteract  trajectory                         UltraInteract

An answer is a text, one message, or a list of messages.
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.formats.base import (
    PAIR_COLUMNS,
    SYSTEM,
    Example,
    Format,
    as_messages,
    checked_prompt,
    pair_example,
    read_side,
    read_turns,
    with_system,
)
from megatron_prefix.data.read.formats.presence import (
    first_of,
    has,
    has_any,
    has_sides,
    holds_dialogues,
)


def dialogue_format(*names: str) -> Format:
    """The format of records whose prompt is the first of these columns that they have."""

    def read(record: dict[str, Any]) -> Example:
        name = first_of(record, *names)
        prompt = checked_prompt(with_system(record, read_turns(record, name)), f"column {name!r}")
        sides = [read_side(record, side) for side in ("chosen", "rejected")]
        _, (chosen, rejected) = as_messages(prompt, sides)
        return pair_example(record, prompt, chosen, rejected)

    return Format(
        read=read,
        needs=("|".join(names), "chosen", "rejected"),
        columns=(*names, "chosen", "rejected", *SYSTEM, *PAIR_COLUMNS),
        fits=lambda record: (
            has_any(record, *names)
            and has_sides(record)
            and not has(record, "prompt")
            and not holds_dialogues(record)
        ),
    )


SHAREGPT = dialogue_format("conversations", "conversation")
MESSAGES = dialogue_format("messages")
ULTRAINTERACT = dialogue_format("trajectory")

"""Responses that are judged alone, with a label: desirable or not.

prompt, completion, label          TRL
messages, label                    ms-swift: the last message is the response
conversations, kto_tag             LLaMA-Factory, ShareGPT
instruction, output, kto_tag       LLaMA-Factory, alpaca
query, response, label             ms-swift
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import (
    column,
    json_type,
    optional_text,
    template_kwargs,
    tools,
    whole,
)
from megatron_prefix.data.read.formats.base import (
    SYSTEM,
    Example,
    ExampleResponse,
    Format,
    as_messages,
    assistant,
    attributes_of,
    blank_notes,
    checked_prompt,
    read_side,
    read_turns,
    with_system,
)
from megatron_prefix.data.read.formats.presence import first_of, has, has_sides
from megatron_prefix.data.read.formats.question import conversation
from megatron_prefix.data.read.texts import Text
from megatron_prefix.data.read.turns import text_or_turns
from megatron_prefix.errors import InputError

LABELS = ("label", "kto_tag")


def read_label(record: dict[str, Any]) -> bool:
    """The label: true or 1 is desirable, false or 0 is not."""
    name = first_of(record, *LABELS)
    value = record.get(name)
    if isinstance(value, bool):
        return value
    number = whole(value)
    if number not in (0, 1):
        raise InputError(
            f"column {name!r} is {json_type(value)}, it must be true or false, or 1 or 0"
        )
    return number == 1


def unpaired_example(record: dict[str, Any], prompt: Text, response: Text) -> Example:
    """The Example of one response: `label` true becomes the score 1, false the score 0."""
    score = float(read_label(record))
    return Example(
        responses=(
            ExampleResponse(
                prompt=prompt,
                response=response,
                score=score,
                attributes=attributes_of(record, record),
            ),
        ),
        pairs=(),
        notes=blank_notes([response]),
        tools=tools(record),
        template_kwargs=template_kwargs(record),
    )


def read_unpaired(record: dict[str, Any]) -> Example:
    """`prompt` and `completion`: texts, or messages."""
    prompt = text_or_turns(column(record, "prompt", str, list, dict), "prompt")
    completion = read_side(record, "completion")
    prompt, (completion,) = as_messages(prompt, [completion])
    return unpaired_example(record, prompt, completion)


def read_unpaired_turns(record: dict[str, Any]) -> Example:
    """A conversation that ends with the response."""
    name = first_of(record, "messages", "conversations")
    turns = with_system(record, read_turns(record, name))
    if not turns or turns[-1].role != "assistant":
        raise InputError(f"column {name!r} must end with the assistant's turn, the response")
    return unpaired_example(record, checked_prompt(turns[:-1], name), turns[-1:])


def read_unpaired_alpaca(record: dict[str, Any]) -> Example:
    """`instruction` and `input`, joined by a line break, answered by `output`; or a `query`
    answered by `response`."""
    parts = [column(record, first_of(record, "instruction", "query"), str)]
    parts.append(optional_text(record, "input"))
    question = "\n".join(part for part in parts if part)
    prompt = checked_prompt(with_system(record, conversation(record, question)), "the conversation")
    answer = column(record, first_of(record, "output", "response"), str)
    return unpaired_example(record, prompt, assistant(answer))


COLUMNS = (*LABELS, "tools", "chat_template_kwargs")


def _has_label(record: dict[str, Any]) -> bool:
    return any(name in record for name in LABELS) and not has_sides(record)


UNPAIRED = Format(
    read=read_unpaired,
    needs=("prompt", "completion", "label|kto_tag"),
    columns=("prompt", "completion", *COLUMNS),
    fits=lambda record: "completion" in record and _has_label(record),
)
UNPAIRED_TURNS = Format(
    read=read_unpaired_turns,
    needs=("messages|conversations", "label|kto_tag"),
    columns=("messages", "conversations", *SYSTEM, *COLUMNS),
    fits=lambda record: (
        (has(record, "messages") or has(record, "conversations"))
        and _has_label(record)
        and not has(record, "prompt")
    ),
)
UNPAIRED_ALPACA = Format(
    read=read_unpaired_alpaca,
    needs=("instruction|query", "output|response", "label|kto_tag"),
    columns=(
        *("instruction", "query", "input", "history", "output", "response"),
        *SYSTEM,
        *COLUMNS,
    ),
    fits=lambda record: (
        (has(record, "instruction", "output") or has(record, "query", "response"))
        and _has_label(record)
    ),
)

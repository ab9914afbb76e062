"""TRL's columns, HH-RLHF's whole dialogues, and unpaired responses.

hh        chosen, rejected: whole dialogues           what both share, see `split_dialogues`
trl       prompt, chosen, rejected: text or messages  as given
unpaired  prompt, completion, label                   as given; no pair
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import Message, Text, column, messages, tools
from megatron_prefix.data.read.formats.base import (
    EQUAL,
    NO_COMMON_PROMPT,
    DegenerateRecord,
    Example,
    ExampleResponse,
    blank_notes,
    checked_prompt,
    checked_response,
    pair_example,
)
from megatron_prefix.data.read.records import json_type
from megatron_prefix.errors import InputError

NOTE_EARLY = "pairs that part before the last turn (the responses hold the later turns)"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def common_prefix(a: str, b: str) -> int:
    """Number of leading characters two texts share."""
    if a == b:
        return len(a)
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def split_dialogues(chosen: str, rejected: str) -> tuple[int, bool]:
    """Where the shared prompt ends, and whether that is before either text's last turn.

    With `Assistant:` turns the prompt ends behind the last one both share. Texts without turns
    are cut where they part, back to the last white space, which stays with the response.
    """
    if chosen == rejected:
        raise DegenerateRecord(EQUAL)
    shared = common_prefix(chosen, rejected)
    if all(marker not in text for marker in (HUMAN, ASSISTANT) for text in (chosen, rejected)):
        cut = max(chosen.rfind(space, 0, shared) for space in (" ", "\n", "\t"))
        if not chosen[: max(cut, 0)].strip():
            raise DegenerateRecord(NO_COMMON_PROMPT)
        return cut, False
    last = chosen.rfind(ASSISTANT, 0, shared)
    if last < 0:
        raise DegenerateRecord(NO_COMMON_PROMPT)
    early = last != chosen.rfind(ASSISTANT) or last != rejected.rfind(ASSISTANT)
    return last + len(ASSISTANT), early


def split_messages(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[int, bool]:
    """Number of shared messages before the last place where both go on with the assistant."""
    if chosen == rejected:
        raise DegenerateRecord(EQUAL)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and not chosen[shared].role == rejected[shared].role == "assistant":
        shared -= 1
    if shared <= 0:
        raise DegenerateRecord(NO_COMMON_PROMPT)
    return shared, max(len(chosen), len(rejected)) > shared + 1


def whole_dialogues(record: dict[str, Any], chosen: Text, rejected: Text) -> Example:
    """Two whole dialogues of one kind, cut where their prompt ends."""
    split = split_dialogues if isinstance(chosen, str) else split_messages
    cut, early = split(chosen, rejected)
    notes = (NOTE_EARLY,) if early else ()
    return pair_example(record, chosen[:cut], chosen[cut:], rejected[cut:], notes=notes)


def read_hh(record: dict[str, Any]) -> Example:
    """Whole dialogues in `chosen` and `rejected`: two texts, or two lists of messages."""
    chosen = column(record, "chosen", str, list)
    rejected = column(record, "rejected", type(chosen))
    if isinstance(chosen, list):
        chosen, rejected = messages(chosen, "chosen"), messages(rejected, "rejected")
    return whole_dialogues(record, chosen, rejected)


def read_trl(record: dict[str, Any]) -> Example:
    """TRL's explicit prompt: three texts, or three lists of messages.

    A prompt that repeats as text what both dialogues hold as messages is passed over.
    """
    prompt = column(record, "prompt", str, list)
    chosen = column(record, "chosen", str, list)
    if isinstance(prompt, str) and isinstance(chosen, list) and _repeats(prompt, record):
        return read_hh(record)
    if type(prompt) is not type(chosen):
        raise InputError(
            f"column 'prompt' is {json_type(prompt)}, but 'chosen' is {json_type(chosen)}: make "
            "them alike, or give --format hh where chosen and rejected hold whole dialogues"
        )
    rejected = column(record, "rejected", type(chosen))
    if isinstance(prompt, str):
        return pair_example(record, prompt, chosen, rejected)
    turns = messages(prompt, "prompt")
    sides = [messages(chosen, "chosen"), messages(rejected, "rejected")]
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        checked_response(side, name)
    return pair_example(record, checked_prompt(turns, "prompt"), *sides)


def _repeats(prompt: str, record: dict[str, Any]) -> bool:
    """Whether `prompt` is a user's turn of both dialogues, as in UltraFeedback's binarized form."""
    sides = (record.get("chosen"), record.get("rejected"))
    return all(
        isinstance(side, list)
        and any(
            isinstance(turn, dict) and turn.get("role") == "user" and turn.get("content") == prompt
            for turn in side
        )
        for side in sides
    )


def read_unpaired(record: dict[str, Any]) -> Example:
    """One response, judged alone: `label` true is a score of 1, false of 0."""
    prompt = column(record, "prompt", str, list)
    completion = column(record, "completion", str, list)
    label = record.get("label")
    if not isinstance(label, bool):
        raise InputError(f"column 'label' is {json_type(label)}, it must be true or false")
    if type(prompt) is not type(completion):
        raise InputError(
            f"column 'prompt' is {json_type(prompt)}, but 'completion' is "
            f"{json_type(completion)}: make them alike"
        )
    if isinstance(prompt, list):
        prompt = checked_prompt(messages(prompt, "prompt"), "prompt")
        completion = checked_response(messages(completion, "completion"), "completion")
    response = ExampleResponse(prompt=prompt, response=completion, score=float(label))
    return Example(
        responses=(response,), pairs=(), notes=blank_notes([completion]), tools=tools(record)
    )

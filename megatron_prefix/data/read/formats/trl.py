"""TRL's columns, HH-RLHF's whole dialogues, and unpaired responses.

format    columns                                    prompt
hh        chosen, rejected: whole dialogues          what both share, see `split_dialogues`
trl       prompt, chosen, rejected: text or messages as given
unpaired  prompt, completion, label                  as given; no pair
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import column, json_type, messages, tools
from megatron_prefix.data.read.formats.base import (
    PAIR_COLUMNS,
    DegenerateRecord,
    Example,
    ExampleResponse,
    Format,
    Reason,
    blank_notes,
    checked_prompt,
    checked_response,
    has_sides,
    pair_example,
)
from megatron_prefix.data.read.texts import Message, Text, common_prefix
from megatron_prefix.errors import InputError

NOTE_EARLY = "pairs that part before the last turn (the responses hold the later turns)"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def split_dialogues(chosen: str, rejected: str) -> tuple[int, bool]:
    """Where the shared prompt ends, and whether that is before either text's last turn.

    With `Assistant:` turns, the prompt ends after the last such marker that both share. Texts
    without turns are cut at the last white space before they differ; it goes to the response.

        "…Human: Hi\\n\\nAssistant: Yes." and "…Human: Hi\\n\\nAssistant: No."   cut before " Yes."
        "The sky is blue" and "The sky is black"                          cut before " blue"
    """
    if chosen == rejected:
        raise DegenerateRecord(Reason.EQUAL)
    shared = common_prefix(chosen, rejected)
    if all(marker not in text for marker in (HUMAN, ASSISTANT) for text in (chosen, rejected)):
        cut = max(chosen.rfind(space, 0, shared) for space in (" ", "\n", "\t"))
        if not chosen[: max(cut, 0)].strip():
            raise DegenerateRecord(Reason.NO_COMMON_PROMPT)
        return cut, False
    last = chosen.rfind(ASSISTANT, 0, shared)
    if last < 0:
        raise DegenerateRecord(Reason.NO_COMMON_PROMPT)
    is_early = last != chosen.rfind(ASSISTANT) or last != rejected.rfind(ASSISTANT)
    return last + len(ASSISTANT), is_early


def split_messages(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[int, bool]:
    """Length of the shared prompt in messages, and whether it ends before the last turn.

    Both dialogues must go on with the assistant after it.
    """
    if chosen == rejected:
        raise DegenerateRecord(Reason.EQUAL)
    # [u, a, u, a1] and [u, a, u, a2, u, a3] share three messages and go on with the assistant: 3.
    # [u, a] and [u, a, u, a2] share two, but the first needs a response: 1.
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    while shared > 0 and not chosen[shared].role == rejected[shared].role == "assistant":
        shared -= 1
    if shared <= 0:
        raise DegenerateRecord(Reason.NO_COMMON_PROMPT)
    return shared, max(len(chosen), len(rejected)) > shared + 1


def cut_pair(
    record: dict[str, Any], chosen: Text, rejected: Text, cut: int, is_early: bool
) -> Example:
    """The Example of two whole dialogues whose prompt ends at `cut`."""
    notes = (NOTE_EARLY,) if is_early else ()
    return pair_example(record, chosen[:cut], chosen[cut:], rejected[cut:], notes=notes)


def read_hh(record: dict[str, Any]) -> Example:
    """Whole dialogues in `chosen` and `rejected`: two texts, or two lists of messages."""
    chosen = column(record, "chosen", str, list)
    rejected = column(record, "rejected", type(chosen))
    if isinstance(chosen, str):
        return cut_pair(record, chosen, rejected, *split_dialogues(chosen, rejected))
    turns, others = messages(chosen, "chosen"), messages(rejected, "rejected")
    return cut_pair(record, turns, others, *split_messages(turns, others))


def read_trl(record: dict[str, Any]) -> Example:
    """TRL's explicit prompt: three texts, or three lists of messages.

    A prompt as text is ignored if both dialogues, as messages, contain it as a user's turn.
    """
    prompt = column(record, "prompt", str, list)
    chosen = column(record, "chosen", str, list)
    if isinstance(prompt, str) and isinstance(chosen, list) and _repeats(prompt, record):
        return read_hh(record)
    if type(prompt) is not type(chosen):
        raise InputError(
            f"column 'prompt' is {json_type(prompt)}, but 'chosen' is {json_type(chosen)}: both "
            "must be text, or both lists of messages; give --format hh if chosen and rejected "
            "hold whole dialogues"
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
    """Whether `prompt` is a user's turn of both dialogues, as in binarized UltraFeedback."""
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
    """One response, judged alone: `label` true becomes the score 1, false the score 0."""
    prompt = column(record, "prompt", str, list)
    completion = column(record, "completion", str, list)
    label = record.get("label")
    if not isinstance(label, bool):
        raise InputError(f"column 'label' is {json_type(label)}, it must be true or false")
    if type(prompt) is not type(completion):
        raise InputError(
            f"column 'prompt' is {json_type(prompt)}, but 'completion' is "
            f"{json_type(completion)}: both must be text, or both lists of messages"
        )
    if isinstance(prompt, list):
        prompt = checked_prompt(messages(prompt, "prompt"), "prompt")
        completion = checked_response(messages(completion, "completion"), "completion")
    response = ExampleResponse(prompt=prompt, response=completion, score=float(label))
    return Example(
        responses=(response,), pairs=(), notes=blank_notes([completion]), tools=tools(record)
    )


HH = Format(read=read_hh, fits=has_sides, columns=("chosen", "rejected", *PAIR_COLUMNS))
TRL = Format(
    read=read_trl,
    fits=lambda record: has_sides(record) and "prompt" in record,
    columns=("prompt", "chosen", "rejected", *PAIR_COLUMNS),
)
UNPAIRED = Format(
    read=read_unpaired,
    fits=lambda record: {"completion", "label"} <= record.keys() and not has_sides(record),
    columns=("prompt", "completion", "label", "tools"),
)

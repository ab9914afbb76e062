"""TRL's columns and HH-RLHF's whole dialogues.

format    columns                                    prompt
hh        chosen, rejected: whole dialogues          what both share, see `split_dialogues`
trl       prompt, chosen, rejected: text or messages as given
"""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.column_names import is_label
from megatron_prefix.data.read.fields import column
from megatron_prefix.data.read.formats.base import (
    PAIR_COLUMNS,
    DegenerateRecord,
    Example,
    Format,
    Reason,
    as_messages,
    checked_prompt,
    checked_response,
    pair_example,
    read_side,
)
from megatron_prefix.data.read.formats.presence import has_sides, holds_dialogues
from megatron_prefix.data.read.texts import (
    ASSISTANT,
    Message,
    Text,
    are_dialogues,
    common_prefix,
)
from megatron_prefix.data.read.turns import text_or_turns
from megatron_prefix.errors import InputError

NOTE_EARLY = "pairs that part before the last turn (the responses hold the later turns)"


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
    if not are_dialogues(chosen, rejected):
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
    chosen = read_side(record, "chosen")
    rejected = read_side(record, "rejected", *((str,) if isinstance(chosen, str) else (list, dict)))
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not are_dialogues(chosen, rejected):
            _refuse_other_texts(record, chosen, rejected)
        return cut_pair(record, chosen, rejected, *split_dialogues(chosen, rejected))
    assert not isinstance(chosen, str) and not isinstance(rejected, str)
    return cut_pair(record, chosen, rejected, *split_messages(chosen, rejected))


def _refuse_other_texts(record: dict[str, Any], chosen: str, rejected: str) -> None:
    """Raise InputError if texts without turns are answers: another column holds their question."""
    for name, value in record.items():
        if name in HH.columns or is_label(name) or not isinstance(value, str) or not value.strip():
            continue
        if not (chosen.startswith(value) and rejected.startswith(value)):
            raise InputError(
                f"chosen and rejected are texts without turns, and column {name!r} is text that "
                f"may be their prompt: give it with --map instruction={name} (or prompt={name}, "
                f"for plain texts), or leave it out with --ignore-columns {name}"
            )


def read_trl(record: dict[str, Any]) -> Example:
    """TRL's explicit prompt: texts, or messages; if one is messages, the texts become messages.

    The prompt is ignored if both dialogues, as messages, contain it: as a user's turn if it is
    text, and at their beginning if it is messages.
    """
    prompt = text_or_turns(column(record, "prompt", str, list, dict), "prompt")
    chosen = read_side(record, "chosen")
    rejected = read_side(record, "rejected", *((str,) if isinstance(chosen, str) else (list, dict)))
    if isinstance(chosen, str) or isinstance(rejected, str):
        prompt, (chosen, rejected) = as_messages(prompt, [chosen, rejected])
        return pair_example(record, prompt, chosen, rejected)
    if _repeat(prompt, chosen, rejected):
        return cut_pair(record, chosen, rejected, *split_messages(chosen, rejected))
    if isinstance(prompt, str) and holds_dialogues(record):
        raise InputError(
            "column 'prompt' is text, but no user's turn of the dialogues in chosen and rejected: "
            "both must be text, or both lists of messages; if the dialogues are complete, leave "
            "out the prompt with --ignore-columns prompt"
        )
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        checked_response(side, name)
    if not isinstance(prompt, str):
        checked_prompt(prompt, "prompt")
    prompt, (chosen, rejected) = as_messages(prompt, [chosen, rejected])
    return pair_example(record, prompt, chosen, rejected)


def _repeat(prompt: Text, *sides: tuple[Message, ...]) -> bool:
    """Whether whole dialogues contain their prompt, as in binarized UltraFeedback."""
    if isinstance(prompt, str):
        return all(
            any(turn.role == "user" and turn.content == prompt for turn in side) for side in sides
        )
    return bool(prompt) and all(side[: len(prompt)] == prompt for side in sides)


HH = Format(
    read=read_hh,
    needs=("chosen", "rejected"),
    columns=("chosen", "rejected", *PAIR_COLUMNS),
    fits=has_sides,
)
TRL = Format(
    read=read_trl,
    needs=("prompt", "chosen", "rejected"),
    columns=("prompt", "chosen", "rejected", *PAIR_COLUMNS),
    fits=lambda record: has_sides(record) and "prompt" in record,
)

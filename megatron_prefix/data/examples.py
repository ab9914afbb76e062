"""Records -> Examples: which texts are compared, whatever columns they came in.

    format    columns                                     prompt
    hh        chosen, rejected: whole dialogues           what both share, see `_split_dialogues`
    trl       prompt, chosen, rejected: text or messages  as given
    sharegpt  conversations, chosen, rejected             the conversation
    oasst     prompt: a message tree with `replies`       the path above each set of siblings

A record that cannot be what its format says raises InputError: the file is wrong. A record that
is well formed but holds nothing to learn from raises DegenerateRecord with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_prefix.data.fields import Message, Text, checked, column, messages, number
from megatron_prefix.data.records import json_type
from megatron_prefix.data.tree import UNRANKED, Pair
from megatron_prefix.errors import InputError

EQUAL = "chosen equals rejected"
NO_COMMON_PROMPT = "no common prompt"
NO_PROMPT_TOKEN = "no prompt token"
NO_RESPONSE_TOKEN = "no response token"
NO_PAIR = "no pair"
DEGENERATE = (EQUAL, NO_COMMON_PROMPT, NO_PROMPT_TOKEN, NO_RESPONSE_TOKEN, NO_PAIR)

NOTE_EARLY = "pairs that part before the last turn (the responses hold the later turns)"
NOTE_BLANK = "responses of white space only (kept)"

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
KINDS = {str: "text", list: "messages"}
NOT_READ = ("tools", "images", "videos", "audios")


class DegenerateRecord(Exception):
    """A well-formed record without anything to compare; the argument is one of DEGENERATE."""


@dataclass(frozen=True, kw_only=True)
class ExampleResponse:
    """One response with the prompt above it, both as text or both as messages."""

    prompt: Text
    response: Text
    set_id: int = 0
    rank: int = UNRANKED
    score: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Example:
    """One group before tokenising: responses in the record's order, chosen first, and pairs."""

    responses: tuple[ExampleResponse, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()


class ExampleReader:
    """Turns records into Examples and holds every record to the format of the first.

    `format` is "auto" (found by the first record's columns) or one of FORMATS.
    """

    def __init__(self, format: str = "auto") -> None:
        if format != "auto" and format not in FORMATS:
            raise InputError(f"format {format!r} is not one of auto, {', '.join(FORMATS)}")
        self.format = format
        self._found = format == "auto"
        self._kind: type | None = None

    def read(self, record: dict[str, Any]) -> Example:
        """One Example. Raises InputError (a wrong file) or DegenerateRecord."""
        format = detect_format(record) if self._found else self.format
        if self.format not in ("auto", format):
            raise InputError(
                f"the columns are those of format {format!r}, the records before have "
                f"{self.format!r}: build one data set from one format"
            )
        for name in NOT_READ:
            if record.get(name):
                raise InputError(f"column {name!r} is not read: remove it, or the record")
        kind = type(record.get("chosen"))
        if self._kind and kind in KINDS and kind is not self._kind:
            raise InputError(
                f"formats are mixed: chosen is {KINDS[kind]}, in the records before it was "
                f"{KINDS[self._kind]}"
            )
        try:
            return FORMATS[format](record)
        except InputError:
            format, kind = self.format, self._kind  # a wrong record sets no rule for later ones
            raise
        finally:
            self.format, self._kind = format, self._kind or (kind if kind in KINDS else None)


def detect_format(record: dict[str, Any]) -> str:
    """The format a record's columns belong to; InputError names the columns where none fits."""
    if "conversations" in record:
        return "sharegpt"
    if isinstance(record.get("prompt"), dict):
        return "oasst"
    if "chosen" in record or "rejected" in record:
        return "trl" if "prompt" in record else "hh"
    raise InputError(
        f"no known format has the columns {', '.join(sorted(record)) or '(none)'}: expected are "
        "chosen and rejected, with prompt or conversations or neither, or an OpenAssistant tree"
    )


def _is_blank(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    return all(not message.content.strip() for message in text)


def _pair_example(
    record: dict[str, Any], prompt: Text, chosen: Text, rejected: Text, notes: tuple[str, ...] = ()
) -> Example:
    """The Example of a record with two responses and TRL's optional numeric columns."""
    if chosen == rejected:
        raise DegenerateRecord(EQUAL)
    weight = number(record, "weight", 1.0)
    if weight <= 0:
        raise InputError(f"column 'weight' is {weight}, it must be above 0")
    sides = (("score_chosen", chosen), ("score_rejected", rejected))
    return Example(
        responses=tuple(
            ExampleResponse(prompt=prompt, response=text, rank=rank, score=number(record, score))
            for rank, (score, text) in enumerate(sides)
        ),
        pairs=(Pair(chosen=0, rejected=1, weight=weight, margin=number(record, "margin")),),
        notes=notes + (NOTE_BLANK,) * (_is_blank(chosen) + _is_blank(rejected)),
    )


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


def _split_dialogues(chosen: str, rejected: str) -> tuple[int, bool]:
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


def _split_messages(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[int, bool]:
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


def read_hh(record: dict[str, Any]) -> Example:
    """Whole dialogues in `chosen` and `rejected`: two texts, or two lists of messages."""
    chosen = column(record, "chosen", str, list)
    rejected = column(record, "rejected", type(chosen))
    if isinstance(chosen, str):
        cut, early = _split_dialogues(chosen, rejected)
    else:
        chosen, rejected = messages(chosen, "chosen"), messages(rejected, "rejected")
        cut, early = _split_messages(chosen, rejected)
    notes = (NOTE_EARLY,) if early else ()
    return _pair_example(record, chosen[:cut], chosen[cut:], rejected[cut:], notes)


def read_trl(record: dict[str, Any]) -> Example:
    """TRL's explicit prompt: three texts, or three lists of messages."""
    prompt = column(record, "prompt", str, list)
    chosen = column(record, "chosen", str, list)
    if type(prompt) is not type(chosen):
        raise InputError(
            f"column 'prompt' is {json_type(prompt)}, but 'chosen' is {json_type(chosen)}: make "
            "them alike, or give --format hh where chosen and rejected hold whole dialogues"
        )
    rejected = column(record, "rejected", type(chosen))
    if isinstance(prompt, str):
        return _pair_example(record, prompt, chosen, rejected)
    turns = messages(prompt, "prompt")
    sides = [messages(chosen, "chosen"), messages(rejected, "rejected")]
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if side and side[0].role != "assistant":
            raise InputError(
                f"{name} begins with role {side[0].role!r}: a response begins with 'assistant'"
            )
        if not side:
            raise DegenerateRecord(NO_RESPONSE_TOKEN)
    return _pair_example(record, _checked_prompt(turns, "prompt"), *sides)


def _checked_prompt(turns: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    if not turns:
        raise DegenerateRecord(NO_PROMPT_TOKEN)
    if turns[-1].role == "assistant":
        raise InputError(
            f"{name} ends with the assistant's turn: the response would be a second one; "
            "put that turn into chosen and rejected"
        )
    return turns


def _sharegpt_message(item: Any, at: str) -> Message:
    if not isinstance(item, dict):
        raise InputError(f"{at} is {json_type(item)}, it must be an object")
    for key in ("from", "value"):
        if not isinstance(item.get(key), str):
            raise InputError(f"{at}: {key!r} is {json_type(item.get(key))}, it must be text")
    if item["from"] not in SHAREGPT_ROLES:
        raise InputError(
            f"{at}: 'from' is {item['from']!r}, not one of {', '.join(SHAREGPT_ROLES)}"
        )
    return Message(role=SHAREGPT_ROLES[item["from"]], content=checked(item["value"], at))


def read_sharegpt(record: dict[str, Any]) -> Example:
    """ShareGPT's `conversations` with one chosen and one rejected message."""
    turns = tuple(
        _sharegpt_message(item, f"conversations, message {i + 1}")
        for i, item in enumerate(column(record, "conversations", list))
    )
    if record.get("system"):
        raise InputError("column 'system' is not read: put it first into conversations")
    sides = []
    for name in ("chosen", "rejected"):
        message = _sharegpt_message(column(record, name, dict), f"column {name!r}")
        if message.role != "assistant":
            raise InputError(f"column {name!r}: 'from' must be 'gpt' or 'assistant'")
        sides.append((message,))
    return _pair_example(record, _checked_prompt(turns, "conversations"), *sides)


def _oasst_message(node: Any, at: str) -> Message:
    if not isinstance(node, dict):
        raise InputError(f"{at} is {json_type(node)}, it must be an object")
    for key, types, wanted in (("text", str, "text"), ("replies", list | None, "a list")):
        if not isinstance(node.get(key), types):
            raise InputError(f"{at}: {key!r} is {json_type(node.get(key))}, it must be {wanted}")
    role = {"prompter": "user", "assistant": "assistant"}.get(str(node.get("role")))
    if role is None:
        raise InputError(f"{at}: 'role' is {node.get('role')!r}, it must be prompter or assistant")
    rank = node.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise InputError(f"{at}: 'rank' is {rank!r}, it must be a whole number from 0 on")
    return Message(role=role, content=checked(node["text"], at))


def _ranked_pairs(ranks: list[int | None]) -> list[tuple[int, int]]:
    """(better, worse) of every two siblings with different ranks: [0, None, 1] -> [(0, 2)]."""
    return [
        (i, j) if ranks[i] < ranks[j] else (j, i)
        for i in range(len(ranks))
        for j in range(i + 1, len(ranks))
        if ranks[i] is not None and ranks[j] is not None and ranks[i] != ranks[j]
    ]


def read_oasst(record: dict[str, Any]) -> Example:
    """An OpenAssistant message tree: assistant siblings of one parent are a comparison set.

    All pairs of siblings with different ranks are labelled; a message without rank or with only
    ties is no response, though it stands in the prompts below it. Sets come in the order of a
    walk from the root, depth first, siblings in the record's order.
    """
    root = column(record, "prompt", dict)
    first = _oasst_message(root, "prompt")
    if first.role != "user":
        raise InputError("prompt: the first message of a tree must have role prompter")
    responses: list[ExampleResponse] = []
    pairs: list[Pair] = []
    stack, num_sets = [(root, (first,), "prompt")], 0
    while stack:
        node, turns, at = stack.pop()
        replies = node.get("replies") or []
        below = [_oasst_message(r, f"{at}, reply {i + 1}") for i, r in enumerate(replies)]
        siblings = [i for i, message in enumerate(below) if message.role == "assistant"]
        labelled = _ranked_pairs([replies[i].get("rank") for i in siblings])
        if labelled and turns[-1].role == "assistant":
            raise InputError(f"{at}: the assistant answers itself: a response needs a prompter")
        index = {}
        for sibling in sorted({side for pair in labelled for side in pair}):
            index[sibling] = len(responses)
            reply = siblings[sibling]
            responses.append(
                ExampleResponse(
                    prompt=turns,
                    response=(below[reply],),
                    set_id=num_sets,
                    rank=replies[reply]["rank"],
                )
            )
        pairs += [Pair(chosen=index[c], rejected=index[r]) for c, r in labelled]
        num_sets += bool(labelled)
        stack += [
            (reply, (*turns, message), f"{at}, reply {i + 1}")
            for i, (reply, message) in enumerate(zip(replies, below, strict=True))
        ][::-1]
    if not pairs:
        raise DegenerateRecord(NO_PAIR)
    notes = (NOTE_BLANK,) * sum(_is_blank(r.response) for r in responses)
    return Example(responses=tuple(responses), pairs=tuple(pairs), notes=notes)


FORMATS: dict[str, Callable[[dict[str, Any]], Example]] = {
    "hh": read_hh,
    "trl": read_trl,
    "sharegpt": read_sharegpt,
    "oasst": read_oasst,
}

"""NeMo RL's ranked completions and NeMo-Aligner's pairs with rewards."""

from __future__ import annotations

import math
from typing import Any

from megatron_prefix.data.read.fields import column, json_type, messages, rank
from megatron_prefix.data.read.formats.base import (
    RANKED_COLUMNS,
    Example,
    Format,
    assistant,
    checked_prompt,
    checked_response,
    has,
    pair_example,
    ranked_example,
)
from megatron_prefix.data.read.texts import Text
from megatron_prefix.errors import InputError

REWARDS = ("chosen_reward", "rejected_reward")


def read_nemo_rl(record: dict[str, Any]) -> Example:
    """`context` and `completions`, each with a `rank` (0 is best) and a `completion`.

    Context and completions are all lists of messages, or all text.
    """
    context = column(record, "context", list, str)
    prompt: Text = context
    if isinstance(context, list):
        prompt = checked_prompt(messages(context, "context"), "context")
    ranks: list[int | None] = []
    responses: list[Text] = []
    for i, item in enumerate(column(record, "completions", list)):
        place = f"completions, entry {i + 1}"
        if not isinstance(item, dict):
            raise InputError(f"{place} is {json_type(item)}, it must be an object")
        try:
            ranks.append(rank(item))
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        if ranks[-1] is None:
            raise InputError(f"{place}: 'rank' is missing, it must be a whole number from 0 on")
        completion: Any = item.get("completion")
        if type(completion) is not type(context):
            raise InputError(
                f"{place}: 'completion' is {json_type(completion)}, but 'context' is "
                f"{json_type(context)}: both must be text, or both lists of messages"
            )
        if isinstance(completion, str):
            responses.append(column(item, "completion", str))
        else:
            responses.append(checked_response(messages(completion, place), place))
    return ranked_example(record, prompt, responses, ranks, [math.nan] * len(ranks))


def read_nemo_aligner(record: dict[str, Any]) -> Example:
    """`prompt`, `chosen_response`, `rejected_response`, `chosen_reward`, `rejected_reward`.

    Texts are used as they are. If the prompt is a list of messages, each response becomes a
    message of the assistant.
    """
    prompt = column(record, "prompt", str, list)
    chosen, rejected = (
        column(record, name, str) for name in ("chosen_response", "rejected_response")
    )
    if isinstance(prompt, list):
        prompt = checked_prompt(messages(prompt, "prompt"), "prompt")
        chosen, rejected = assistant(chosen), assistant(rejected)
    return pair_example(record, prompt, chosen, rejected, scores=REWARDS)


NEMO_RL = Format(
    read=read_nemo_rl,
    fits=lambda record: has(record, "context", "completions"),
    columns=("context", "completions", *RANKED_COLUMNS),
)
NEMO_ALIGNER = Format(
    read=read_nemo_aligner,
    fits=lambda record: has(record, "chosen_response") or has(record, "rejected_response"),
    columns=(
        "prompt",
        "chosen_response",
        "rejected_response",
        *REWARDS,
        "margin",
        *RANKED_COLUMNS,
    ),
)

"""NeMo RL's ranked completions and NeMo-Aligner's pairs with rewards."""

from __future__ import annotations

import math
from typing import Any

from megatron_prefix.data.read.fields import Text, column, messages, rank
from megatron_prefix.data.read.formats.base import (
    Example,
    assistant,
    checked_prompt,
    checked_response,
    pair_example,
    ranked_example,
)
from megatron_prefix.data.read.records import json_type
from megatron_prefix.errors import InputError

REWARDS = ("chosen_reward", "rejected_reward")


def read_nemo_rl(record: dict[str, Any]) -> Example:
    """`context` and `completions`, each with a `rank` (0 is best) and a `completion`.

    Context and completions are lists of messages, or all of them text.
    """
    context = column(record, "context", list, str)
    prompt: Text = context
    if isinstance(context, list):
        prompt = checked_prompt(messages(context, "context"), "context")
    ranks, responses = [], []
    for i, item in enumerate(column(record, "completions", list)):
        at = f"completions, entry {i + 1}"
        if not isinstance(item, dict):
            raise InputError(f"{at} is {json_type(item)}, it must be an object")
        try:
            ranks.append(rank(item))
        except InputError as error:
            raise InputError(f"{at}: {error}") from None
        if ranks[-1] is None:
            raise InputError(f"{at}: 'rank' is missing, it must be a whole number from 0 on")
        response = item.get("completion")
        if type(response) is not type(context):
            raise InputError(
                f"{at}: 'completion' is {json_type(response)}, but 'context' is "
                f"{json_type(context)}: make them alike"
            )
        if isinstance(response, str):
            response = column(item, "completion", str)
        else:
            response = checked_response(messages(response, at), at)
        responses.append(response)
    return ranked_example(record, prompt, responses, ranks, [math.nan] * len(ranks))


def read_nemo_aligner(record: dict[str, Any]) -> Example:
    """`prompt`, `chosen_response`, `rejected_response`, `chosen_reward`, `rejected_reward`.

    Texts are taken as they are; where the prompt is a list of messages, the responses become the
    assistant's.
    """
    prompt = column(record, "prompt", str, list)
    sides: list[Text] = [
        column(record, name, str) for name in ("chosen_response", "rejected_response")
    ]
    if isinstance(prompt, list):
        prompt = checked_prompt(messages(prompt, "prompt"), "prompt")
        sides = [assistant(side) for side in sides]
    return pair_example(record, prompt, *sides, scores=REWARDS)

"""NeMo RL's ranked completions and NeMo-Aligner's pairs with rewards."""

from __future__ import annotations

from typing import Any

from megatron_prefix.data.read.fields import column
from megatron_prefix.data.read.formats.base import (
    RANKED_COLUMNS,
    Example,
    Format,
    as_messages,
    pair_example,
    ranked_example,
)
from megatron_prefix.data.read.formats.entries import read_entries
from megatron_prefix.data.read.formats.presence import has
from megatron_prefix.data.read.texts import Text
from megatron_prefix.data.read.turns import FIELDS, text_or_turns

REWARDS = ("chosen_reward", "rejected_reward")
SCORES = ("score", "reward")
"""Fields of a completion that may hold its score."""


def read_nemo_rl(record: dict[str, Any]) -> Example:
    """`context` and `completions`, each with a `rank` (0 is best) and a `completion`.

    Context and completions are lists of messages or texts. The score of a completion is kept; if
    no completion has a rank, the scores decide.
    """
    prompt = text_or_turns(column(record, "context", list, str), "context")
    entries = read_entries(record, "completions", ("completion",), SCORES)
    prompt, responses = as_messages(prompt, entries.responses)
    return ranked_example(record, prompt, responses, entries.ranks, entries.scores)


def read_nemo_aligner(record: dict[str, Any]) -> Example:
    """`prompt`, `chosen_response`, `rejected_response`, `chosen_reward`, `rejected_reward`.

    Texts are used as they are. If the prompt is a list of messages, each response becomes a
    message of the assistant.
    """
    prompt = text_or_turns(column(record, "prompt", str, list), "prompt")
    sides: list[Text] = [column(record, n, str) for n in ("chosen_response", "rejected_response")]
    prompt, (chosen, rejected) = as_messages(prompt, sides)
    return pair_example(record, prompt, chosen, rejected, scores=REWARDS)


NEMO_RL = Format(
    read=read_nemo_rl,
    needs=("context", "completions"),
    columns=("context", "completions", *RANKED_COLUMNS),
    fields=(*FIELDS, "completion", "rank", *SCORES),
)
NEMO_ALIGNER = Format(
    read=read_nemo_aligner,
    needs=("prompt", "chosen_response", "rejected_response"),
    columns=(
        "prompt",
        "chosen_response",
        "rejected_response",
        *REWARDS,
        "margin",
        *RANKED_COLUMNS,
    ),
    fits=lambda record: has(record, "chosen_response") or has(record, "rejected_response"),
)

"""Comparisons of a step with its responses alone: what differs, by how much, and how much may."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.data.store import PreferenceDataset
from megatron_prefix.engine.shadow import StepTable
from megatron_prefix.train.rounding import DEVIATIONS, TOLERANCE

SCORES = {"lm": "log-probability", "reward": "score"}
"""What a response has, by `model.kind`."""


@dataclass(frozen=True, order=True)
class Finding:
    """One comparison of the two runs. The order of findings is that of `share`."""

    share: float
    """The difference over what rounding allows: above 1 the runs are not the same."""
    kind: str
    """What is compared: `score`, `mismatch`, `kl`, `loss`, `norm` or `gradient`."""
    quantity: str
    """The same in words, with the response or the parameter."""
    difference: float
    budget: float
    step: int
    """Counted from 1."""

    @classmethod
    def of(cls, kind: str, quantity: str, difference: float, budget: float, step: int) -> Finding:
        share = difference / max(budget, 1e-300)
        # A comparison with not-a-number is false; that must not pass for equal.
        share = math.inf if math.isnan(share) else share
        return cls(share, kind, quantity, difference, budget, step)

    def __str__(self) -> str:
        return (
            f"the {self.quantity} differs by {self.difference:.2e}, {self.share:.2g} times the "
            f"{self.budget:.2e} that rounding allows"
        )


def budgets_of(table: StepTable, noise: Tensor, rounding: float) -> Tensor:
    """By how much each value of the table may differ, in nats or units of score; `noise` is a table
    of `response_noise`, `rounding` that of the precision."""
    columns, parts = table.columns, table.parts
    own = TOLERANCE + DEVIATIONS * rounding * noise[: columns.num_entries]
    budgets = [own]
    if parts.heads:  # a head is a part of its response
        budgets.append(own[torch.from_numpy(columns.pairs)].flatten())
    if parts.alignments:  # the mean over tokens of logp and of log(sum of p^2)
        budgets.append(2 * own / torch.from_numpy(columns.num_tokens))
    return torch.cat(budgets)


def names_of(model: str, dataset: PreferenceDataset) -> Callable[[int, int], str]:
    """What a response of a group has, in words."""
    word = SCORES[model]
    return lambda group, response: f"{word} of response {response} of {dataset.place(group)}"


def worst_score(
    kind: str,
    name: Callable[[int, int], str],
    rows: list[MicroBatch],
    scores: list[Tensor],
    table: StepTable,
    alone: Tensor,
    budgets: Tensor,
    step: int,
) -> Iterator[Finding]:
    """The response of these rows that differs most from its entry in the table, if one is there.

    `name` gives the score of a response of a group in words, `scores` are what `response_scores`
    gave for each row, `alone` and `budgets` are of the table.
    """
    ids = table.columns.response_ids
    entry_of = {(int(group), int(response)): i for i, (group, response) in enumerate(ids)}
    findings = []
    for row, values in zip(rows, scores, strict=True):
        for (group, response), value in zip(row.response_ids, values.tolist(), strict=False):
            entry = entry_of.get((int(group), int(response)))
            if entry is not None:
                quantity = name(int(group), int(response))
                difference = abs(value - float(alone[entry]))
                budget = float(budgets[entry])
                findings.append(Finding.of(kind, quantity, difference, budget, step))
    if findings:
        yield max(findings)

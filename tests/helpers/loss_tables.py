"""Tables of responses, pairs and sets for tests of objectives."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import torch
from torch import Tensor

from megatron_prefix.config import LossConfig
from megatron_prefix.objectives import LossInputs, LossOutputs, Objective, check


def float64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def table(ref_is_policy: bool = False, seed: int = 0, **columns: Tensor | None) -> LossInputs:
    """Seven responses in three comparison sets, of which the last one has nothing to compare.

    Set 0 is ranked [0, 1], set 1 [0, 1, 2, 1] with a tie; set 2 is one response. Pairs are all with
    different ranks but one, so that weights and pairs do not follow from the ranks.
    """
    generator = torch.Generator().manual_seed(seed)
    scores, ref = (-20 * torch.rand(7, generator=generator, dtype=torch.float64) for _ in range(2))
    inputs = LossInputs(
        scores=scores,
        ref_logps=scores.clone() if ref_is_policy else ref,
        num_tokens=torch.tensor([11, 4, 12, 9, 13, 6, 8]),
        pairs=torch.tensor([[0, 1], [2, 3], [2, 4], [2, 5], [3, 4]]),
        margins=float64([0.5, 1.0, 0.0, 2.0, 0.25]),
        pair_weights=float64([1.0, 2.0, 0.5, 1.0, 1.5]),
        ranks=torch.tensor([0, 1, 0, 1, 2, 1, -1]),
        labels=float64([1.0, 0.25, 0.75, 0.5, 0.0, 0.5, 0.125]),
        desirable=float64([1.0, 0.0, 1.0, 0.0, 0.0, 1.0, math.nan]),
        kl=float64(0.0 if ref_is_policy else 1.5),
        running_rewards=torch.zeros(2, dtype=torch.float64),
        members=torch.tensor([[0, 1, -1, -1], [2, 3, 4, 5], [6, -1, -1, -1]]),
        set_weights=float64([1.0, 1.0, 0.0]),
        betas=float64([0.05, float("nan"), 0.3, 1.0, float("nan")]),
        heads=0.6 * scores[torch.tensor([[0, 1], [2, 3], [2, 4], [2, 5], [3, 4]])],
        ref_heads=0.5 * ref[torch.tensor([[0, 1], [2, 3], [2, 4], [2, 5], [3, 4]])],
        alignments=-torch.rand(7, generator=generator, dtype=torch.float64),
    )
    return replace(inputs, **columns)


def one_pair(scores: torch.Tensor, num_tokens: torch.Tensor) -> LossInputs:
    """A table of one pair, whose reference is the policy itself."""
    one = torch.ones(1, dtype=torch.float64)
    return LossInputs(
        scores=scores,
        ref_logps=scores,
        num_tokens=num_tokens,
        pairs=torch.tensor([[0, 1]]),
        margins=one,
        pair_weights=one,
        ranks=torch.tensor([0, 1]),
        labels=torch.tensor([1.0, 0.0], dtype=torch.float64),
        desirable=torch.tensor([1.0, 0.0], dtype=torch.float64),
        kl=torch.zeros((), dtype=torch.float64),
        running_rewards=torch.zeros(2, dtype=torch.float64),
        members=torch.tensor([[0, 1]]),
        set_weights=one,
    )


OF_THE_STEP = ("pairs", "members", "set_weights", "tail_weight", "running_rewards", "kl")
"""Fields of a table that have no value for each response or pair."""


def split(inputs: LossInputs) -> list[LossInputs]:
    """The same responses in three tables, one for each comparison set."""
    parts = []
    for members, weight in zip(inputs.members, inputs.set_weights, strict=True):
        responses = members[members >= 0]
        place = torch.full((len(inputs.scores),), -1)
        place[responses] = torch.arange(len(responses))
        is_own = place[inputs.pairs[:, 0]] >= 0
        columns = {}
        for field in fields(inputs):
            value = getattr(inputs, field.name)
            if not isinstance(value, Tensor):
                continue
            if field.name in ("margins", "betas", "pair_weights", "heads", "ref_heads"):
                columns[field.name] = value[is_own]
            elif field.name not in OF_THE_STEP:
                columns[field.name] = value[responses]
        pairs = place[inputs.pairs[is_own]].reshape(-1, 2)
        own = torch.arange(len(responses))[None]
        parts.append(replace(inputs, **columns, pairs=pairs, members=own, set_weights=weight[None]))
    return parts


def objective(kind: str | None = None, **loss) -> Objective:
    return check(LossConfig(**loss), kind)


def outputs(inputs: LossInputs, kind: str | None = None, **loss) -> LossOutputs:
    """Values of the first member of a loss section."""
    return objective(kind, **loss).members[0].outputs(inputs)

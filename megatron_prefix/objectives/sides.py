"""Losses of language models that look at each side of a pair by itself, or at the scores that the
data gives: a function and a record each.

Shapes: P pairs. Log-probabilities are sums over a response's tokens, in nats, float64. In the
equations, u and v are the log-ratios of the chosen and the rejected response: policy minus
reference. S(x) is -log sigmoid(x). Rewards are beta u and beta v. All tensors are [P].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_prefix.objectives.pairwise import LOGPS, WITH_REFERENCE, beta_of
from megatron_prefix.objectives.record import (
    FirstValue,
    LossOutputs,
    ObjectiveRecord,
    Option,
    log_sigmoid,
    reward_metrics,
)

if TYPE_CHECKING:
    from torch import Tensor

LABELS = ("chosen_labels", "rejected_labels")


def nca_pair_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> LossOutputs:
    """Noise contrastive alignment of a pair.

        loss = S(beta u) + S(-beta u) / 2 + S(-beta v) / 2

    Chen et al. 2024 (arXiv 2402.05369), equation 8, for two responses of which one is right.
    """
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    negatives = log_sigmoid(-chosen) + log_sigmoid(-rejected)
    losses = -log_sigmoid(chosen) - negatives / 2
    return LossOutputs(losses=losses, metrics=reward_metrics(chosen, rejected))


def bco_pair_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> LossOutputs:
    """Binary classifier optimisation of both sides of a pair.

        loss = S(beta u) + S(-beta v)

    Jung et al. 2024 (arXiv 2404.04656), equation 11, without its shift by the mean reward: TRL
    1.16 has none, TRL up to 0.24 subtracts a running mean.
    """
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    losses = -log_sigmoid(chosen) - log_sigmoid(-rejected)
    return LossOutputs(losses=losses, metrics=reward_metrics(chosen, rejected))


def sppo_hard_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> LossOutputs:
    """Self-play preference optimisation with certain preferences.

        loss = (u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2

    Wu et al. 2024 (arXiv 2405.00675), equation 4.7, with a probability of 1 for the chosen and 0
    for the rejected response.
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    goal = 1 / (2 * beta)
    losses = (chosen - goal).square() + (rejected + goal).square()
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def apo_zero_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> LossOutputs:
    """Anchored preference optimisation for chosen responses better than the model's own.

        loss = 1 - sigmoid(beta u) + sigmoid(beta v)

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7.
    """
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    losses = 1 - chosen.sigmoid() + rejected.sigmoid()
    return LossOutputs(losses=losses, metrics=reward_metrics(chosen, rejected))


def apo_down_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> LossOutputs:
    """Anchored preference optimisation for chosen responses worse than the model's own.

        loss = sigmoid(beta u) + 1 - sigmoid(beta (u - v))

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 8.
    """
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    losses = chosen.sigmoid() + 1 - (chosen - rejected).sigmoid()
    return LossOutputs(losses=losses, metrics=reward_metrics(chosen, rejected))


def rpo_bwd_kl_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    *,
    beta: float,
    reward_scale: float = 1.0,
) -> LossOutputs:
    """Reward-aware preference optimisation: the KL divergence of the model's preference from that
    of the data's scores.

        loss = KL(sigmoid(g) || sigmoid(d)),   d = beta (u - v),
        g = reward_scale (score chosen - score rejected)

    NVIDIA 2024 (Nemotron-4 340B, arXiv 2406.11704), equation 2, with NeMo-Aligner's name.
    """
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    gap = reward_scale * (chosen_labels - rejected_labels)
    losses = _binary_kl(gap, chosen - rejected)
    return LossOutputs(losses=losses, metrics=reward_metrics(chosen, rejected))


def rpo_fwd_kl_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    *,
    beta: float,
    reward_scale: float = 1.0,
) -> LossOutputs:
    """`rpo_bwd_kl_loss` with the two sides of the divergence exchanged.

        loss = KL(sigmoid(d) || sigmoid(g))

    NVIDIA 2024 (Nemotron-4 340B, arXiv 2406.11704), as NeMo-Aligner's `rpo_fwd_kl`.
    """
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    gap = reward_scale * (chosen_labels - rejected_labels)
    losses = _binary_kl(chosen - rejected, gap)
    return LossOutputs(losses=losses, metrics=reward_metrics(chosen, rejected))


def rpo_sq_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_labels: Tensor,
    rejected_labels: Tensor,
    *,
    beta: float,
    reward_scale: float = 1.0,
) -> LossOutputs:
    """`rpo_bwd_kl_loss` with the square of the difference.

        loss = (d - g)^2

    NVIDIA 2024 (Nemotron-4 340B, arXiv 2406.11704), as NeMo-Aligner's `rpo_sq`.
    """
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    gap = reward_scale * (chosen_labels - rejected_labels)
    losses = (chosen - rejected - gap).square()
    return LossOutputs(losses=losses, metrics=reward_metrics(chosen, rejected))


def _binary_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL divergence of two Bernoulli distributions, given by their log-odds."""
    return p.sigmoid() * (log_sigmoid(p) - log_sigmoid(q)) + (-p).sigmoid() * (
        log_sigmoid(-p) - log_sigmoid(-q)
    )


TWO_LN_2 = FirstValue(formula="2 ln 2", value=lambda **options: 2 * math.log(2))
ONE = FirstValue(formula="1", value=lambda **options: 1.0)
OF_SCORES = FirstValue(formula="the value at d = 0")
AWARE = {**WITH_REFERENCE, "reward_scale": Option(default=1.0)}

RECORDS = (
    ObjectiveRecord(
        name="nca_pair",
        function=nca_pair_loss,
        columns=LOGPS,
        options=WITH_REFERENCE,
        model="lm",
        rewards_per_nat=beta_of,
        first=TWO_LN_2,
    ),
    ObjectiveRecord(
        name="bco_pair",
        function=bco_pair_loss,
        columns=LOGPS,
        options=WITH_REFERENCE,
        model="lm",
        rewards_per_nat=beta_of,
        first=TWO_LN_2,
    ),
    ObjectiveRecord(
        name="sppo_hard",
        function=sppo_hard_loss,
        columns=LOGPS,
        options=WITH_REFERENCE,
        model="lm",
        rewards_per_nat=beta_of,
        first=FirstValue(formula="1 / (2 beta^2)", value=lambda beta, **options: 0.5 / beta**2),
    ),
    ObjectiveRecord(
        name="apo_zero",
        function=apo_zero_loss,
        columns=LOGPS,
        options=WITH_REFERENCE,
        model="lm",
        rewards_per_nat=beta_of,
        first=ONE,
    ),
    ObjectiveRecord(
        name="apo_down",
        function=apo_down_loss,
        columns=LOGPS,
        options=WITH_REFERENCE,
        model="lm",
        rewards_per_nat=beta_of,
        first=ONE,
    ),
    *(
        ObjectiveRecord(
            name=name,
            function=function,
            columns=(*LOGPS, *LABELS),
            options=AWARE,
            model="lm",
            rewards_per_nat=beta_of,
            first=OF_SCORES,
        )
        for name, function in (
            ("rpo_bwd_kl", rpo_bwd_kl_loss),
            ("rpo_fwd_kl", rpo_fwd_kl_loss),
            ("rpo_sq", rpo_sq_loss),
        )
    ),
)

"""Losses of language models over (chosen, rejected) pairs: a function and a record each.

Shapes: P pairs. Log-probabilities are sums over a response's tokens, in nats, float64. In the
equations, u and v are the log-ratios of the chosen and the rejected response: policy minus
reference.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

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

LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
NUM_TOKENS = ("chosen_num_tokens", "rejected_num_tokens")


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossOutputs:
    """Direct preference optimisation.

    With the rewards beta u and beta v and their difference d = beta (u - v),

        loss = -(1 - s) log sigmoid(d) - s log sigmoid(-d)

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7, for s = 0; the conservative form, with
    `label_smoothing` s, is Mitchell 2023. All tensors are [P].
    """
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    margins = chosen - rejected
    losses = -(1 - label_smoothing) * log_sigmoid(margins) - label_smoothing * log_sigmoid(-margins)
    return LossOutputs(losses=losses, metrics=reward_metrics(chosen, rejected))


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_num_tokens: Tensor,
    rejected_num_tokens: Tensor,
    *,
    beta: float,
) -> LossOutputs:
    """Identity preference optimisation, with log-ratios per token.

        loss = (u / n_chosen - v / n_rejected - 1 / (2 beta))^2

    Azar et al. 2023 (arXiv 2310.12036), equation 17, with tau = beta. The division by n, the
    number of a response's own tokens, is that of TRL 1.16, whose authors confirmed it with those of
    the paper. Rewards are beta u and beta v. All tensors are [P].
    """
    chosen = chosen_logps - ref_chosen_logps
    rejected = rejected_logps - ref_rejected_logps
    gap = chosen / chosen_num_tokens - rejected / rejected_num_tokens
    losses = (gap - 1 / (2 * beta)).square()
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


RECORDS = (
    ObjectiveRecord(
        name="sigmoid",
        function=dpo_loss,
        columns=LOGPS,
        options={"beta": Option(default=0.1), "label_smoothing": Option(default=0.0)},
        model="lm",
        rewards_per_nat=lambda beta, label_smoothing: beta,
        first=FirstValue(
            formula="ln 2",
            value=lambda beta, label_smoothing: math.log(2),
            steepness=lambda beta, label_smoothing: 1 - 2 * label_smoothing,
        ),
    ),
    ObjectiveRecord(
        name="ipo",
        function=ipo_loss,
        columns=(*LOGPS, *NUM_TOKENS),
        options={"beta": Option(default=0.1)},
        model="lm",
        rewards_per_nat=lambda beta: beta,
        first=FirstValue(
            formula="1 / (4 beta^2)",
            value=lambda beta: 1 / (4 * beta**2),
            steepness=lambda beta: 2 / beta**2,
            per_token=True,
        ),
    ),
)

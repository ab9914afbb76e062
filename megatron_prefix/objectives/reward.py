"""Losses of reward models over (chosen, rejected) pairs: a function and a record each.

Shapes: P pairs. Rewards are what the model gives a response, float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.objectives.record import (
    LossOutputs,
    ObjectiveRecord,
    Option,
    log_sigmoid,
    reward_metrics,
)

if TYPE_CHECKING:
    from torch import Tensor


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margins: Tensor | None = None,
    center_rewards_coefficient: float | None = None,
) -> LossOutputs:
    """Negative log-likelihood of the preference under Bradley and Terry's model.

        loss = -log sigmoid(r_chosen - r_rejected - m) + c (r_chosen + r_rejected)^2

    Ouyang et al. 2022 (arXiv 2203.02155), equation 1, for m = 0 and c = 0. A margin m > 0 asks
    for that distance: Touvron et al. 2023 (arXiv 2307.09288), equation 2. Without c, a constant
    added to all rewards changes nothing; c > 0 (0.01 is usual) pulls their mean to zero:
    Eisenstein et al. 2023 (arXiv 2312.09244), equation 2. All tensors are [P]; `margins` and the
    coefficient default to 0.
    """
    logits = chosen_rewards - rejected_rewards
    if margins is not None:
        logits = logits - margins
    losses = -log_sigmoid(logits)
    if center_rewards_coefficient is not None:
        sums = chosen_rewards + rejected_rewards
        losses = losses + center_rewards_coefficient * sums.square()
    return LossOutputs(losses=losses, metrics=reward_metrics(chosen_rewards, rejected_rewards))


RECORDS = (
    ObjectiveRecord(
        name="bradley_terry",
        function=bradley_terry_loss,
        columns=("chosen_rewards", "rejected_rewards"),
        options={
            "margin": Option(default=False, column="margins"),
            "center_rewards_coefficient": Option(),
        },
        model="reward",
    ),
)

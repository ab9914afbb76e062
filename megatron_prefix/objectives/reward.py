"""Losses of reward models over pairs and over single responses: a function and a record each.

Shapes: P pairs, R responses. Rewards are what the model gives a response, float64. Losses over
ranked sets are in ranking.py.
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


def scaled_bradley_terry_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, margins: Tensor
) -> LossOutputs:
    """Bradley and Terry's loss, multiplied by the margin that the data gives a pair.

        loss = -m log sigmoid(r_chosen - r_rejected)

    Wang et al. 2024 (HelpSteer2-Preference, arXiv 2410.01257), equation 3; NeMo-Aligner's
    `scaled_bt`. The mean is over pairs, and not over the sum of margins. All tensors are [P].
    """
    losses = -margins * log_sigmoid(chosen_rewards - rejected_rewards)
    return LossOutputs(losses=losses, metrics=reward_metrics(chosen_rewards, rejected_rewards))


def regression_loss(
    label_scores: Tensor,
    label_values: Tensor,
    attribute_names: tuple[str, ...],
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
) -> LossOutputs:
    """Squared error of the reward against the score that the data gives.

        loss = (r - score)^2

    Wang et al. 2024 (HelpSteer2, arXiv 2406.08673), section 4. `label_scores` and `label_values`
    are [R, A], with one attribute or several; a label of NaN is unknown, and takes no part. The
    mean is over all labels of the step; NeMo takes it per micro batch. `losses` are the sums over
    attributes, [R].
    """
    is_known = ~label_values.isnan()
    losses = (label_scores - label_values.nan_to_num()).square().where(is_known, 0.0)
    sums, counts = losses.detach().sum(dim=0), is_known.sum(dim=0).to(losses.dtype)
    mse = {"mse": (sums.sum(), counts.sum())}
    for i, name in enumerate(attribute_names):
        mse[f"mse/{name}"] = sums[i], counts[i]
    return LossOutputs(
        losses=losses.sum(dim=1),
        metrics=reward_metrics(chosen_rewards, rejected_rewards),
        label_metrics=mse,
    )


PAIR = ("chosen_rewards", "rejected_rewards")

RECORDS = (
    ObjectiveRecord(
        name="bradley_terry",
        function=bradley_terry_loss,
        columns=PAIR,
        options={
            "margin": Option(default=False, column="margins"),
            "center_rewards_coefficient": Option(),
        },
        model="reward",
    ),
    ObjectiveRecord(
        name="scaled_bradley_terry",
        function=scaled_bradley_terry_loss,
        columns=(*PAIR, "margins"),
        options={},
        model="reward",
    ),
    ObjectiveRecord(
        name="regression",
        function=regression_loss,
        columns=("label_scores", "label_values", "attribute_names", *PAIR),
        options={},
        model="reward",
        unit="response",
    ),
)

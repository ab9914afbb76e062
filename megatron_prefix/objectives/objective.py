"""The configured loss over one set of pairs, and the names of what is logged of it.

Shapes: R responses, P pairs.
"""

from __future__ import annotations

from torch import Tensor

from megatron_prefix.config.schema import LossConfig
from megatron_prefix.objectives import PairRewards, bradley_terry_loss, dpo_loss

REWARD_METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
)
LOGP_METRICS = ("logps/chosen", "logps/rejected")


def pair_metrics(loss: LossConfig) -> tuple[str, ...]:
    """Names of what `preference_loss` sums over a row's pairs; the loss is weighted, the others
    are not. A reward model has no log-probabilities."""
    return REWARD_METRICS if loss.loss_type == "bradley_terry" else REWARD_METRICS + LOGP_METRICS


def pair_rewards(
    loss: LossConfig,
    scores_R: Tensor,
    ref_R: Tensor | None,
    pairs_P2: Tensor,
    margins_P: Tensor,
) -> PairRewards:
    """Loss and rewards of every pair, [P] each.

    `scores_R` are response log-probabilities in nats, or a reward model's scores, float64;
    `ref_R` the reference's, None where there is none; `margins_P` are used with `loss.margin`.
    Raises ValueError where the loss needs a reference and `ref_R` is None.
    """
    chosen, rejected = pairs_P2.unbind(1)
    if loss.loss_type == "bradley_terry":
        return bradley_terry_loss(
            scores_R[chosen],
            scores_R[rejected],
            margins=margins_P if loss.margin else None,
            center_rewards_coefficient=loss.center_rewards_coefficient,
        )
    if ref_R is None:
        raise ValueError("the batch has no ref_logps: give it some by TrainBatch.with_reference")
    return dpo_loss(
        scores_R[chosen],
        scores_R[rejected],
        ref_R[chosen],
        ref_R[rejected],
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
    )

"""Losses of reward models over (chosen, rejected) pairs.

Shapes: P pairs. Rewards are a reward model's scores, float64.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_prefix.objectives.pairwise import PairRewards


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margins: Tensor | None = None,
    center_rewards_coefficient: float | None = None,
) -> PairRewards:
    """Negative log-likelihood of the preference under Bradley and Terry's model.

        loss = -log sigmoid(r_chosen - r_rejected - m) + c (r_chosen + r_rejected)^2

    Ouyang et al. 2022 (arXiv 2203.02155), equation 1, for m = 0 and c = 0. A margin m > 0 asks
    for that distance: Touvron et al. 2023 (arXiv 2307.09288), equation 2. The loss knows rewards
    up to a constant only; c > 0 (0.01 is usual) pulls them to mean zero: Eisenstein et al. 2023
    (arXiv 2312.09244), equation 2. All tensors are [P]; `margins` and the coefficient default to 0.
    """
    logits = chosen - rejected
    if margins is not None:
        logits = logits - margins
    losses = -logsigmoid(logits)
    if center_rewards_coefficient is not None:
        losses = losses + center_rewards_coefficient * (chosen + rejected).square()
    return PairRewards(losses, chosen.detach(), rejected.detach())

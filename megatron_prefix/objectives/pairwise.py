"""Losses over (chosen, rejected) pairs.

Shapes: P pairs. Log-probabilities are sums over a response's tokens, in nats, float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class PairRewards(NamedTuple):
    """Loss and implicit rewards of each pair, [P] each; rewards carry no gradient."""

    losses: Tensor
    chosen: Tensor
    rejected: Tensor

    @property
    def margins(self) -> Tensor:
        return self.chosen - self.rejected

    @property
    def accuracies(self) -> Tensor:
        """1 where the chosen reward is above, 1/2 at a tie, 0 where it is below."""
        return (torch.sign(self.margins) + 1) / 2


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PairRewards:
    """Direct preference optimisation.

    With the implicit reward r = beta (logp - ref_logp) and the margin m = r_chosen - r_rejected,

        loss = -(1 - s) log sigmoid(m) - s log sigmoid(-m)

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7, for s = 0; the conservative form with
    label noise s is Mitchell 2023. At m = 0 it is ln 2 whatever s. All arguments and results
    are [P].
    """
    chosen = beta * (chosen_logps - ref_chosen_logps)
    rejected = beta * (rejected_logps - ref_rejected_logps)
    margins = chosen - rejected
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    return PairRewards(losses, chosen.detach(), rejected.detach())

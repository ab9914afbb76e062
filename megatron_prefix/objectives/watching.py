"""What is watched beside the loss: how far the policy is from the reference, and whether rewards
follow length.

All of it is over the pairs, each counting once, so it does not depend on rows, sharing or ranks.
Shapes: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_prefix.objectives.table import LossInputs

if TYPE_CHECKING:
    from torch import Tensor

MOMENTS = "moments/"
"""Begins the names of sums that are not logged themselves."""
LEAST_DEVIATION = 1e-6
"""Rewards that differ by less are equal to rounding, as in the first step of a run."""


def log_ratios(inputs: LossInputs) -> dict[str, Tensor]:
    """Of a language model with a reference, [P] each, in nats: the log-ratio of both sides of the
    pairs, and the mean of both.

        logratios/mean = mean over responses of (logp - ref_logp)

    It estimates the KL divergence of the policy from the reference on the responses of the data. It
    is the divergence itself only for responses that the policy writes, so it may be negative. `kl`
    is the same, unless the objective has an estimate of its own and logs that as `kl`.
    """
    if inputs.ref_logps is None:
        return {}
    ratios = (inputs.scores.detach() - inputs.ref_logps)[inputs.pairs]
    return {
        "logratios/chosen": ratios[:, 0],
        "logratios/rejected": ratios[:, 1],
        "logratios/mean": ratios.mean(dim=1),
        "kl": ratios.mean(dim=1),
    }


def length_moments(inputs: LossInputs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """What `with_correlation` needs of the rewards [P] and own tokens of both sides, [2P] each."""
    import torch

    rewards = torch.cat([chosen, rejected]).double()
    lengths = torch.cat([inputs.chosen_num_tokens, inputs.rejected_num_tokens]).to(rewards)
    values = {
        "length": lengths,
        "reward": rewards,
        "length^2": lengths.square(),
        "reward^2": rewards.square(),
        "length reward": lengths * rewards,
    }
    return {f"{MOMENTS}{name}": x for name, x in values.items()}


def with_correlation(means: Mapping[str, float]) -> dict[str, float]:
    """The means of a step or a data set, with the correlation of length and reward (Pearson's) in
    the place of the moments. It is left out if all lengths, or all rewards, are equal.

    Lengths 2 and 4 with rewards 0.1 and 0.5: 1.0.
    """
    logged = {name: value for name, value in means.items() if not name.startswith(MOMENTS)}
    moments = {
        name.removeprefix(MOMENTS): value
        for name, value in means.items()
        if name.startswith(MOMENTS)
    }
    if not moments:
        return logged
    length, reward = moments["length"], moments["reward"]
    variances = moments["length^2"] - length**2, moments["reward^2"] - reward**2
    if min(variances) > LEAST_DEVIATION**2:
        covariance = moments["length reward"] - length * reward
        logged["rewards/length_correlation"] = covariance / math.sqrt(math.prod(variances))
    return logged

"""Losses that compare the distributions of chosen and rejected responses over a whole step.

Both sides of the step's pairs are sorted, each by itself, and the smallest is compared with the
smallest. So a loss value belongs to a place in the sorted order and not to a pair of the data: only
the mean over the step has a meaning, and pairs cannot have weights. Shapes: P pairs. S(x) is
-log sigmoid(x), u and v are the log-ratios of the chosen and the rejected response, s is
`label_smoothing`. All tensors are [P], float64, in nats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_prefix.objectives.pairwise import BETA, LN_2, LOGPS, SMOOTHING, beta_of
from megatron_prefix.objectives.record import (
    PAIR_OPTIONS,
    LossOutputs,
    ObjectiveRecord,
    reward_metrics,
    smoothed,
)

if TYPE_CHECKING:
    from torch import Tensor


def aot_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossOutputs:
    """Alignment by optimal transport, for paired data.

        loss_i = (1 - s) S(beta g_i) + s S(-beta g_i),
        g = sort(chosen - rejected) - sort(ref_chosen - ref_rejected)

    Melnyk et al. 2024 (arXiv 2406.05882), equation 13, sorted over all pairs of the step; TRL sorts
    those of one micro batch on one device. With one pair it is `sigmoid`.
    """
    policy, reference = chosen_logps - rejected_logps, ref_chosen_logps - ref_rejected_logps
    losses = smoothed(beta * (_sorted(policy) - _sorted(reference)), label_smoothing)
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def aot_unpaired_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> LossOutputs:
    """Alignment by optimal transport, for data whose sides are not paired.

        loss_i = (1 - s) S(beta g_i) + s S(-beta g_i),   g = sort(u) - sort(v)

    Melnyk et al. 2024 (arXiv 2406.05882), equation 10, sorted over the step as in `aot_loss`.
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    losses = smoothed(beta * (_sorted(chosen) - _sorted(rejected)), label_smoothing)
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def _sorted(values: Tensor) -> Tensor:
    """Ascending; equal values stay in their order, so that gradients do not depend on chance."""
    return values.sort(stable=True).values


RECORDS = tuple(
    ObjectiveRecord(
        name=name,
        function=function,
        columns=LOGPS,
        options={**BETA, **SMOOTHING, "ld_alpha": PAIR_OPTIONS["ld_alpha"]},
        model="lm",
        scope="step",
        takes_weights=False,
        rewards_per_nat=beta_of,
        first=LN_2,
    )
    for name, function in (("aot", aot_loss), ("aot_unpaired", aot_unpaired_loss))
)

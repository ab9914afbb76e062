"""Losses of single responses that are labelled desirable or not: a function and a record each.

A response is desirable (1) or undesirable (0) by the label of its record, or because it is chosen
or rejected in its pairs; one with neither is NaN and takes no part. The mean is over labels, and
weights do not enter its denominator. Shapes: R responses, P pairs. x is a response's log-ratio,
policy minus reference, in nats, float64 [R]. S(x) is -log sigmoid(x). Rewards are beta x.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megatron_prefix.objectives.pairwise import BETA, beta_of
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

COLUMNS = ("scores", "ref_logps", "desirable", "pairs")
WEIGHTS = {"desirable_weight": Option(default=1.0), "undesirable_weight": Option(default=1.0)}


def kto_loss(
    scores: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    pairs: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutputs:
    """Kahneman-Tversky optimisation.

        desirable    desirable_weight (1 - sigmoid(beta (x - z)))
        undesirable  undesirable_weight (1 - sigmoid(beta (z - x)))

    Ethayarajh et al. 2024 (arXiv 2402.01306), equation 7. z is `kl`, 0-dimensional and without
    gradient: max(0, mean of x over the mismatched responses of the step), which follow the prompt
    of another record. TRL rotates the responses within the micro batch of one device and takes the
    mean of the ranks' means; here mismatches belong to the data, so z does not depend on rows.
    """
    rewards, shift = beta * (scores - ref_logps), beta * kl.detach()
    good = desirable_weight * (shift - rewards).sigmoid()
    bad = undesirable_weight * (rewards - shift).sigmoid()
    outputs = _outputs(good, bad, rewards, desirable, pairs, scores)
    outputs.label_metrics["kl"] = (kl.detach(), kl.new_ones(()))
    return outputs


def apo_zero_unpaired_loss(
    scores: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    pairs: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutputs:
    """Anchored preference optimisation of single responses.

        desirable    desirable_weight (1 - sigmoid(beta x))
        undesirable  undesirable_weight sigmoid(beta x)

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7, one side at a time.
    """
    rewards = beta * (scores - ref_logps)
    good, bad = desirable_weight * (-rewards).sigmoid(), undesirable_weight * rewards.sigmoid()
    return _outputs(good, bad, rewards, desirable, pairs, scores)


def bco_loss(
    scores: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    pairs: Tensor,
    running_rewards: Tensor,
    *,
    beta: float,
) -> LossOutputs:
    """Binary classifier optimisation: is a response desirable, by its reward?

        desirable    S(beta x - delta)
        undesirable  S(delta - beta x)

    Jung et al. 2024 (arXiv 2404.04656), equation 11. delta is the mean reward of all labelled
    responses of the run so far: `running_rewards` is their sum and their number, those of this
    step included, float64 [2]. TRL up to 0.24 brings it up to date at every micro batch. The
    weights of the paper's section 4.2, which need embeddings of the prompts, are left out.
    """
    total, count = running_rewards.detach()
    delta = total / count.clamp(min=1)
    rewards = beta * (scores - ref_logps)
    good, bad = -log_sigmoid(rewards - delta), -log_sigmoid(delta - rewards)
    outputs = _outputs(good, bad, rewards, desirable, pairs, scores)
    outputs.label_metrics["delta"] = (delta, delta.new_ones(()))
    return outputs


def bco_rewards(scores: Tensor, ref_logps: Tensor, desirable: Tensor, *, beta: float) -> Tensor:
    """What a step adds to `running_rewards` of `bco_loss`: sum and number of its rewards."""
    import torch

    rewards = beta * (scores - ref_logps).detach()
    is_labelled = ~desirable.isnan()
    return torch.stack([rewards[is_labelled].sum(), is_labelled.sum().to(rewards)])


def _outputs(
    good: Tensor, bad: Tensor, rewards: Tensor, desirable: Tensor, pairs: Tensor, scores: Tensor
) -> LossOutputs:
    """The loss of each response by its label, and what is logged: rewards by label, as TRL does,
    and, of data with pairs, margins and accuracy."""
    is_good, is_bad = desirable == 1, desirable == 0
    losses = good * is_good + bad * is_bad
    rewards, logps = rewards.detach(), scores.detach()
    by_pair = reward_metrics(rewards[pairs[:, 0]], rewards[pairs[:, 1]])
    by_label: dict[str, tuple[Tensor, Tensor]] = {}
    for side, label, which in (
        ("chosen", "desirable", is_good),
        ("rejected", "undesirable", is_bad),
    ):
        number = which.sum().to(rewards)
        by_label[f"rewards/{side}"] = (rewards * which).sum(), number
        by_label[f"logps/{side}"] = (logps * which).sum(), number
        by_label[f"count/{label}"] = number, number.new_zeros(())
    return LossOutputs(
        losses=losses,
        metrics={name: by_pair[name] for name in ("rewards/margins", "rewards/accuracies")},
        label_metrics=by_label,
    )


def _half(desirable_weight: float, undesirable_weight: float, **options: Any) -> float | None:
    """The first value, if it does not depend on how many responses have each label."""
    return desirable_weight / 2 if desirable_weight == undesirable_weight else None


HALF = FirstValue(formula="half the mean weight", value=_half)

RECORDS = (
    ObjectiveRecord(
        name="kto",
        function=kto_loss,
        columns=(*COLUMNS, "kl"),
        options={**BETA, **WEIGHTS},
        model="lm",
        unit="label",
        rewards_per_nat=beta_of,
        first=HALF,
    ),
    ObjectiveRecord(
        name="apo_zero_unpaired",
        function=apo_zero_unpaired_loss,
        columns=COLUMNS,
        options={**BETA, **WEIGHTS},
        model="lm",
        unit="label",
        rewards_per_nat=beta_of,
        first=HALF,
    ),
    ObjectiveRecord(
        name="bco",
        function=bco_loss,
        columns=(*COLUMNS, "running_rewards"),
        options=BETA,
        model="lm",
        unit="label",
        scope="step",
        adds_to_running=bco_rewards,
        rewards_per_nat=beta_of,
        first=FirstValue(formula="ln 2", value=lambda **options: math.log(2)),
    ),
)

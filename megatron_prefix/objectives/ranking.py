"""Losses over whole comparison sets of ranked or scored responses, and their records.

Shapes: S comparison sets, K responses of the largest set. `s` [S, K] are the rewards: beta times
the log-ratio of a policy, or the score of a reward model. `mask` [S, K] says which entries are
responses. Each function returns one loss per set [S], float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_prefix.objectives.pairwise import BETA, LOGPS, beta_of
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

NO_LOGIT = -math.inf


def plackett_luce(s: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of a ranking under the model of Plackett and Luce.

        loss = sum over i of log(sum over j in {i} and all that are worse than i of e^(s_j - s_i))

    Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3. `ranks` [S, K]: 0 is best, -1 unknown.
    Only responses that beat another one are summed over; a set of two is DPO. Responses of equal
    rank are never compared with each other, and those of unknown rank take no part.
    """
    losses = s.new_zeros(len(s))
    for i in range(s.size(1)):
        own = ranks[:, i : i + 1]
        is_worse = mask & (own >= 0) & (ranks > own)
        is_taken = is_worse.clone()
        is_taken[:, i] = True
        total = s.masked_fill(~is_taken, NO_LOGIT).logsumexp(dim=1)
        losses = losses + (total - s[:, i]).where(is_worse.any(dim=1), 0.0)
    return losses


def infonca(s: Tensor, labels: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Cross entropy of the distributions that the data's scores and the rewards define.

        loss = - sum over i of softmax(score / temperature)_i log softmax(s)_i

    Chen et al. 2024 (arXiv 2402.05369), equation 5. `labels` [S, K] are the scores, one for every
    response. The authors' code adds 0.01 to the best score; this one does not.
    """
    targets = _targets(labels, mask, temperature)
    logs = s.masked_fill(~mask, NO_LOGIT).log_softmax(dim=1).masked_fill(~mask, 0.0)
    return -(targets * logs).sum(dim=1)


def nca(s: Tensor, labels: Tensor, mask: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Noise contrastive alignment: the rewards themselves, not only their differences.

        loss = - sum over i of softmax(score / temperature)_i log sigmoid(s_i)
               - mean over i of log sigmoid(-s_i)

    Chen et al. 2024 (arXiv 2402.05369), equation 7. `labels` as in `infonca`.
    """
    targets = _targets(labels, mask, temperature)
    negatives = log_sigmoid(-s).masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)
    return -(targets * log_sigmoid(s)).sum(dim=1) - negatives


def _targets(labels: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The distribution of the data's scores; sets without scores, which do not count, have one too,
    so that 0 times their loss is 0."""
    return (labels.nan_to_num() / temperature).masked_fill(~mask, NO_LOGIT).softmax(dim=1)


def lipo_lambda(s: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """DPO over all pairs of a set, weighted by what an exchange would change of the ranking's gain.

        loss = sum over score_i > score_j of w_ij log(1 + exp(s_j - s_i))
        w_ij = |2^score_i - 2^score_j| |1 / ln(1 + tau_i) - 1 / ln(1 + tau_j)|

    Liu et al. 2024 (LiPO, arXiv 2402.01878), equation 10. tau is the place of a response by s, 1
    for the largest, without gradient; equal s are in the order of the responses. `labels` [S, K]
    are the scores, which the paper has between 0 and 1.
    """
    import torch

    order = s.detach().masked_fill(~mask, NO_LOGIT).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(1, s.size(1) + 1, dtype=s.dtype, device=s.device).expand_as(s)
    tau = torch.empty_like(s).scatter_(1, order, places)
    gains, discounts = 2.0 ** labels.nan_to_num(), 1 / tau.log1p()
    losses = s.new_zeros(len(s))
    for i in range(s.size(1)):
        is_worse = mask & mask[:, i : i + 1] & (labels < labels[:, i : i + 1])
        weights = (gains[:, i : i + 1] - gains).abs() * (discounts[:, i : i + 1] - discounts).abs()
        terms = -weights * log_sigmoid(s[:, i : i + 1] - s)
        losses = losses + terms.where(is_worse, 0.0).sum(dim=1)
    return losses


def top1(s: Tensor, goodness: Tensor, mask: Tensor) -> Tensor:
    """Whether the response of the largest reward is a best one, [S]; of n that share the largest
    reward each counts 1/n. `goodness` [S, K] is larger for better responses."""
    s, goodness = (x.detach().masked_fill(~mask, NO_LOGIT) for x in (s, goodness))
    is_top = s == s.amax(dim=1, keepdim=True)
    is_best = goodness == goodness.amax(dim=1, keepdim=True)
    return (is_top & is_best).sum(dim=1) / is_top.sum(dim=1).to(s.dtype)


def _goodness(judged: Tensor) -> Tensor:
    """Ranks, which are integers and of which 0 is best, or scores, as larger is better."""
    if judged.is_floating_point():
        return judged
    return (-judged).double().masked_fill(judged < 0, NO_LOGIT)


def _of_policy(values: Callable[..., Tensor], judged: str) -> Callable[..., LossOutputs]:
    """The objective of a language model: s = beta (logp - ref_logp)."""

    def loss(
        *,
        set_scores: Tensor,
        set_ref_logps: Tensor,
        set_mask: Tensor,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
        beta: float,
        **judged_and_options: Any,
    ) -> LossOutputs:
        known = judged_and_options.pop(judged)
        s = beta * (set_scores - set_ref_logps)
        chosen = beta * (chosen_logps - ref_chosen_logps)
        rejected = beta * (rejected_logps - ref_rejected_logps)
        return LossOutputs(
            losses=values(s, known, set_mask, **judged_and_options),
            metrics=reward_metrics(chosen, rejected),
            set_metrics={"rewards/top1": top1(s, _goodness(known), set_mask)},
        )

    loss.__doc__ = values.__doc__
    return loss


def _of_reward_model(values: Callable[..., Tensor], judged: str) -> Callable[..., LossOutputs]:
    """The objective of a reward model: s are its scores."""

    def loss(
        *,
        set_scores: Tensor,
        set_mask: Tensor,
        chosen_rewards: Tensor,
        rejected_rewards: Tensor,
        **judged_and_options: Any,
    ) -> LossOutputs:
        known = judged_and_options.pop(judged)
        return LossOutputs(
            losses=values(set_scores, known, set_mask, **judged_and_options),
            metrics=reward_metrics(chosen_rewards, rejected_rewards),
            set_metrics={"rewards/top1": top1(set_scores, _goodness(known), set_mask)},
        )

    loss.__doc__ = values.__doc__
    return loss


POLICY_COLUMNS = ("set_scores", "set_ref_logps", "set_mask", *LOGPS)
REWARD_COLUMNS = ("set_scores", "set_mask", "chosen_rewards", "rejected_rewards")


def _record(
    values: Callable[..., Tensor],
    judged: str,
    first: FirstValue | None,
    options: dict[str, Option],
) -> ObjectiveRecord:
    """An objective by the name of its function, for both kinds of model."""
    name = values.__name__
    return ObjectiveRecord(
        name=name,
        function=_of_policy(values, judged),
        columns=(*POLICY_COLUMNS, judged),
        options={**BETA, **options},
        model="lm",
        unit="set",
        rewards_per_nat=beta_of,
        first=first,
        reward_variant=ObjectiveRecord(
            name=name,
            function=_of_reward_model(values, judged),
            columns=(*REWARD_COLUMNS, judged),
            options=options,
            model="reward",
            unit="set",
        ),
    )


TEMPERATURE = {"temperature": Option(default=1.0)}

RECORDS = (
    _record(plackett_luce, "set_ranks", FirstValue(formula="mean of ln K! over the sets"), {}),
    _record(infonca, "set_labels", FirstValue(formula="mean of ln K over the sets"), TEMPERATURE),
    _record(
        nca,
        "set_labels",
        FirstValue(formula="2 ln 2", value=lambda **options: 2 * math.log(2)),
        TEMPERATURE,
    ),
    _record(lipo_lambda, "set_labels", None, {}),
)

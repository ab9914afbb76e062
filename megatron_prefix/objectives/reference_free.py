"""Losses of language models without a reference: a function and a record each.

Shapes: P pairs. Log-probabilities are sums over a response's own tokens, in nats, float64. S(x) is
-log sigmoid(x). All tensors are [P].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_prefix.objectives.pairwise import BETA, NUM_TOKENS, SMOOTHING
from megatron_prefix.objectives.record import (
    PAIR_BETA,
    PAIR_OPTIONS,
    Added,
    FirstValue,
    LossOutputs,
    ObjectiveRecord,
    Option,
    Unit,
    log_sigmoid,
    reward_metrics,
    smoothed,
)

if TYPE_CHECKING:
    from torch import Tensor

SFT = "sft"


def sft_loss(
    chosen_full_logps: Tensor,
    rejected_full_logps: Tensor,
    chosen_num_tokens: Tensor,
    *,
    sft_average: str = "token",
) -> LossOutputs:
    """Negative log-likelihood of the chosen responses.

        token      loss = - sum of log-probabilities / number of tokens, over all chosen responses
        response   loss = - log-probability / n of each chosen response

    As a term beside a preference loss: Pang et al. 2024 (Iterative RPO, arXiv 2404.19733), equation
    2, whose mean is per response. TRL's `sft`, and its `rpo_alpha` up to 0.24, take the mean over
    tokens, of the micro batch; here the tokens are those of the step. A response that is chosen in
    several pairs counts in each. `losses` are sums over tokens under `token`; rewards are the
    log-probabilities.
    """
    losses = -chosen_full_logps
    if sft_average == "response":
        losses = losses / chosen_num_tokens
    return LossOutputs(
        losses=losses, metrics=reward_metrics(chosen_full_logps, rejected_full_logps)
    )


def cpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> LossOutputs:
    """Contrastive preference optimisation: its preference term.

        loss = (1 - s) S(d) + s S(-d),   d = beta (chosen - rejected)

    Xu et al. 2024 (arXiv 2401.08417), equation 3. `cpo_alpha` times the loss `sft` is added.
    """
    chosen, rejected = beta * chosen_logps, beta * rejected_logps
    losses = smoothed(chosen - rejected, label_smoothing)
    return LossOutputs(losses=losses, metrics=reward_metrics(chosen, rejected))


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_num_tokens: Tensor,
    rejected_num_tokens: Tensor,
    *,
    beta: float,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> LossOutputs:
    """Simple preference optimisation: the mean log-probability is the reward.

        loss = (1 - s) S(d) + s S(-d)
        d = beta (x_chosen - x_rejected) - simpo_gamma,   x = log-probability / n

    Meng et al. 2024 (arXiv 2405.14734), equation 6. The authors' code gives gamma / beta instead
    of gamma. With `alpha` a, x becomes (1 - exp(-a x)) / a: Gupta et al. 2025 (AlphaPO, arXiv
    2501.03884). TRL's CPOTrainer adds its `cpo_alpha` times `sft` here too; the loss types [simpo,
    sft] do that. Rewards are beta x.
    """
    chosen = _alpha_reward(chosen_logps / chosen_num_tokens, alpha)
    rejected = _alpha_reward(rejected_logps / rejected_num_tokens, alpha)
    losses = smoothed(beta * (chosen - rejected) - simpo_gamma, label_smoothing)
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def _alpha_reward(mean_logps: Tensor, alpha: float) -> Tensor:
    return mean_logps if alpha == 0 else -(-alpha * mean_logps).expm1() / alpha


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_num_tokens: Tensor,
    rejected_num_tokens: Tensor,
    *,
    beta: float,
) -> LossOutputs:
    """Odds ratio preference optimisation: its odds-ratio term.

        loss = beta S(log odds(x_chosen) - log odds(x_rejected))
        log odds(x) = x - log(1 - e^x),   x = log-probability / n

    Hong et al. 2024 (arXiv 2403.07691), equation 7, with beta its lambda. The loss `sft` is added,
    over tokens of responses, as in the paper; TRL's counts the tokens of prompts too. Rewards are
    beta x, as in TRL.
    """
    chosen, rejected = chosen_logps / chosen_num_tokens, rejected_logps / rejected_num_tokens
    log_odds = (chosen - _log_one_minus_exp(chosen)) - (rejected - _log_one_minus_exp(rejected))
    log_ratios = log_sigmoid(log_odds)
    return LossOutputs(
        losses=-beta * log_ratios,
        metrics={
            **reward_metrics(beta * chosen, beta * rejected),
            "log_odds_ratio": log_ratios.detach(),
            "log_odds_chosen": log_odds.detach(),
        },
    )


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact on both sides of -ln 2."""
    import torch

    # The branch that is not taken must not give an infinite gradient.
    is_low = x < -math.log(2)
    low, high = torch.where(is_low, x, -1.0), torch.where(is_low, -1.0, x)
    return torch.where(is_low, (-low.exp()).log1p(), (-high.expm1()).log())


def _sft_unit(sft_average: str, **options: object) -> Unit:
    return "token" if sft_average == "token" else "pair"


OF_REFERENCE = FirstValue(formula="the reference's own value")
"""In a list with a loss that has a reference."""

RECORDS = (
    ObjectiveRecord(
        name=SFT,
        function=sft_loss,
        columns=("chosen_full_logps", "rejected_full_logps", "chosen_num_tokens"),
        options={"sft_average": Option(default="token")},
        model="lm",
        unit=_sft_unit,
        is_likelihood=True,
        first=FirstValue(formula="the reference's own negative log-likelihood"),
    ),
    ObjectiveRecord(
        name="cpo",
        function=cpo_loss,
        columns=("chosen_logps", "rejected_logps"),
        options={
            **BETA,
            **PAIR_BETA,
            **SMOOTHING,
            "cpo_alpha": Option(default=1.0, is_outside=True),
        },
        model="lm",
        first=OF_REFERENCE,
        adds=Added(name=SFT, weight="cpo_alpha"),
    ),
    ObjectiveRecord(
        name="simpo",
        function=simpo_loss,
        columns=("chosen_logps", "rejected_logps", *NUM_TOKENS),
        options={
            **BETA,
            **PAIR_BETA,
            "simpo_gamma": Option(default=0.5),
            "alpha": Option(default=0.0),
            **SMOOTHING,
            "use_weighting": PAIR_OPTIONS["use_weighting"],
        },
        model="lm",
        first=OF_REFERENCE,
    ),
    ObjectiveRecord(
        name="orpo",
        function=orpo_loss,
        columns=("chosen_logps", "rejected_logps", *NUM_TOKENS),
        options={**BETA, **PAIR_BETA},
        model="lm",
        first=OF_REFERENCE,
        adds=Added(name=SFT),
    ),
)

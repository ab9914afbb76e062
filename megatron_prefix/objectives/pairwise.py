"""Losses of language models over the difference of a pair's log-ratios: a function and a record
each.

Shapes: P pairs. Log-probabilities are sums over a response's tokens, in nats, float64. In the
equations, u and v are the log-ratios of the chosen and the rejected response, policy minus
reference, or f' of the ratios under another divergence (divergences.py), and d = beta (u - v). S(x)
is -log sigmoid(x). Rewards are beta times the log-ratios under every divergence, as in TRL.
Losses that look at each side by itself are in sides.py. All tensors are [P].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_prefix.objectives.divergences import (
    DIVERGENCE,
    LARGEST_EXPONENT,
    divergence_scores,
)
from megatron_prefix.objectives.record import (
    PAIR_BETA,
    PAIR_OPTIONS,
    FirstValue,
    LossOutputs,
    ObjectiveRecord,
    Option,
    log_sigmoid,
    reward_metrics,
    smoothed,
)

if TYPE_CHECKING:
    from torch import Tensor

LOGPS = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
NUM_TOKENS = ("chosen_num_tokens", "rejected_num_tokens")
BETA = {"beta": Option(default=0.1)}
WITH_REFERENCE = {**BETA, **PAIR_BETA, **PAIR_OPTIONS}
LEAST_EXO_SMOOTHING = 1e-3


def beta_of(beta: float, **options: object) -> float:
    """Reward per nat of log-ratio of every loss whose rewards are beta times log-ratios."""
    return beta


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    margins: Tensor | None = None,
    dpop_lambda: float | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutputs:
    """Direct preference optimisation.

        loss = (1 - s) S(d - m) + s S(m - d)

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7, for s = 0 and m = 0; the conservative
    form, with `label_smoothing` s, is Mitchell 2023. TRL 1.16 ignores `label_smoothing` here. A
    margin m, in units of reward, is the offset of Amini et al. 2024 (arXiv 2402.10571). With
    `dpop_lambda`, d becomes d - beta dpop_lambda max(0, ref_chosen - chosen), a penalty for a
    chosen response that becomes less likely: Pal et al. 2024 (arXiv 2402.13228), equation 3.
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    scores = [
        divergence_scores(x, f_divergence_type, f_alpha_divergence_coef) for x in (chosen, rejected)
    ]
    logits = beta * (scores[0] - scores[1])
    if dpop_lambda is not None:
        logits = logits - beta * dpop_lambda * (-chosen).relu()  # no slope at the start
    if margins is not None:
        logits = logits - margins
    losses = smoothed(logits, label_smoothing)
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def _difference(
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
) -> Tensor:
    """d of two log-ratios."""
    divergence = f_divergence_type, f_alpha_divergence_coef
    return beta * (
        divergence_scores(chosen, *divergence) - divergence_scores(rejected, *divergence)
    )


def robust_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutputs:
    """DPO whose mean is not biased by labels that are wrong with probability s.

        loss = ((1 - s) S(d) - s S(-d)) / (1 - 2 s)

    Chowdhury et al. 2024 (arXiv 2403.00409), equation 12, with s the `label_smoothing`.
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    d = _difference(chosen, rejected, beta, f_divergence_type, f_alpha_divergence_coef)
    s = label_smoothing
    losses = (s * log_sigmoid(-d) - (1 - s) * log_sigmoid(d)) / (1 - 2 * s)
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def hinge_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutputs:
    """Sequence likelihood calibration, with the log-ratios of DPO.

        loss = max(0, 1 - d)

    Zhao et al. 2023 (arXiv 2305.10425), equation 1, which has no reference; with one it is that of
    Liu et al. 2023 (arXiv 2309.06657) and of TRL.
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    d = _difference(chosen, rejected, beta, f_divergence_type, f_alpha_divergence_coef)
    losses = (1 - d).clamp(min=0)
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_num_tokens: Tensor,
    rejected_num_tokens: Tensor,
    *,
    beta: float,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutputs:
    """Identity preference optimisation, with log-ratios per token.

        loss = (u / n_chosen - v / n_rejected - 1 / (2 beta))^2

    Azar et al. 2023 (arXiv 2310.12036), equation 17, with tau = beta. The division by n, the
    number of a response's own tokens, is that of TRL 1.16, whose authors confirmed it with those of
    the paper; TRL up to 0.24 and NeMo-Aligner do not divide. Rewards are not divided.
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    divergence = f_divergence_type, f_alpha_divergence_coef
    u, v = divergence_scores(chosen, *divergence), divergence_scores(rejected, *divergence)
    gap = u / chosen_num_tokens - v / rejected_num_tokens
    losses = (gap - 1 / (2 * beta)).square()
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def sigmoid_norm_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_num_tokens: Tensor,
    rejected_num_tokens: Tensor,
    *,
    beta: float,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutputs:
    """DPO with log-ratios per token.

        loss = S(beta (u / n_chosen - v / n_rejected))

    Lambert et al. 2024 (Tülu 3, arXiv 2411.15124), equation 6. Rewards are not divided.
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    divergence = f_divergence_type, f_alpha_divergence_coef
    u, v = divergence_scores(chosen, *divergence), divergence_scores(rejected, *divergence)
    losses = -log_sigmoid(beta * (u / chosen_num_tokens - v / rejected_num_tokens))
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def exo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = LEAST_EXO_SMOOTHING,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutputs:
    """Efficient exact optimisation: the reverse KL divergence of the model's preference from the
    smoothed label.

        loss = q (log q - log(1 - s)) + (1 - q) (log(1 - q) - log s),   q = sigmoid(d)

    Ji et al. 2024 (arXiv 2402.00856), equation 16, with s the `label_smoothing`, which must be
    above 0. TRL computes log s in float32.
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    d = _difference(chosen, rejected, beta, f_divergence_type, f_alpha_divergence_coef)
    right, wrong = math.log1p(-label_smoothing), math.log(label_smoothing)
    losses = d.sigmoid() * (log_sigmoid(d) - right) + (-d).sigmoid() * (log_sigmoid(-d) - wrong)
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


def discopop_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    discopop_tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> LossOutputs:
    """A loss that a language model discovered: a blend of a logistic and an exponential loss.

        loss = (1 - q) S(d) + q exp(-d),   q = sigmoid(d / discopop_tau)

    Lu et al. 2024 (arXiv 2406.08414), equation 5. With the authors' tau of 0.05 the loss rises with
    d from -0.119 to 0.072, so the gradient of pairs at d = 0 lowers d; from a tau of 0.11 on it
    falls everywhere.
    """
    chosen, rejected = chosen_logps - ref_chosen_logps, rejected_logps - ref_rejected_logps
    d = _difference(chosen, rejected, beta, f_divergence_type, f_alpha_divergence_coef)
    q = (d / discopop_tau).sigmoid()
    # Where q is 0 to rounding, exp(-d) may be infinite; the product is 0.
    losses = -log_sigmoid(d) * (1 - q) + (-d).clamp(max=LARGEST_EXPONENT).exp() * q
    return LossOutputs(losses=losses, metrics=reward_metrics(beta * chosen, beta * rejected))


LN_2 = FirstValue(formula="ln 2", value=lambda **options: math.log(2))
SMOOTHING = {"label_smoothing": Option(default=0.0)}

RECORDS = (
    ObjectiveRecord(
        name="sigmoid",
        function=dpo_loss,
        columns=LOGPS,
        options={
            **WITH_REFERENCE,
            **SMOOTHING,
            "margin": Option(default=False, column="margins"),
            "dpop_lambda": Option(),
            **DIVERGENCE,
        },
        model="lm",
        rewards_per_nat=beta_of,
        first=FirstValue(
            formula="ln 2",
            value=lambda margin, **options: None if margin else math.log(2),
        ),
        may_omit_reference=True,
    ),
    ObjectiveRecord(
        name="robust",
        function=robust_loss,
        columns=LOGPS,
        options={**WITH_REFERENCE, **SMOOTHING, **DIVERGENCE},
        model="lm",
        rewards_per_nat=beta_of,
        first=LN_2,
    ),
    ObjectiveRecord(
        name="hinge",
        function=hinge_loss,
        columns=LOGPS,
        options={**WITH_REFERENCE, **DIVERGENCE},
        model="lm",
        rewards_per_nat=beta_of,
        first=FirstValue(formula="1", value=lambda **options: 1.0),
        may_omit_reference=True,
    ),
    ObjectiveRecord(
        name="ipo",
        function=ipo_loss,
        columns=(*LOGPS, *NUM_TOKENS),
        options={**WITH_REFERENCE, **DIVERGENCE},
        model="lm",
        rewards_per_nat=beta_of,
        first=FirstValue(formula="1 / (4 beta^2)", value=lambda beta, **options: 1 / (4 * beta**2)),
        may_omit_reference=True,
    ),
    ObjectiveRecord(
        name="sigmoid_norm",
        function=sigmoid_norm_loss,
        columns=(*LOGPS, *NUM_TOKENS),
        options={**WITH_REFERENCE, **DIVERGENCE},
        model="lm",
        rewards_per_nat=beta_of,
        first=LN_2,
    ),
    ObjectiveRecord(
        name="exo_pair",
        function=exo_loss,
        columns=LOGPS,
        options={
            **WITH_REFERENCE,
            "label_smoothing": Option(
                default=LEAST_EXO_SMOOTHING,
                is_allowed=lambda value: value > 0,
                allowed="above 0, for example 0.001",
            ),
            **DIVERGENCE,
        },
        model="lm",
        rewards_per_nat=beta_of,
        first=FirstValue(
            formula="-ln 2 - ln(s (1 - s)) / 2",
            value=lambda label_smoothing, **options: (
                -math.log(2) - math.log(label_smoothing * (1 - label_smoothing)) / 2
            ),
        ),
    ),
    ObjectiveRecord(
        name="discopop",
        function=discopop_loss,
        columns=LOGPS,
        options={**WITH_REFERENCE, "discopop_tau": Option(default=0.05), **DIVERGENCE},
        model="lm",
        rewards_per_nat=beta_of,
        first=FirstValue(formula="ln 2 / 2 + 1/2", value=lambda **options: math.log(2) / 2 + 0.5),
    ),
)

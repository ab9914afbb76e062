"""f-divergences: what takes the place of a log-ratio if the policy is held near the reference by
another divergence than the reverse KL divergence.

Wang et al. 2023 (arXiv 2309.16240), equation 8: with the divergence of f, the implicit reward is
beta f'(pi / ref), up to a constant. With u the log-ratio log(pi / ref), f' is

    reverse_kl        u
    forward_kl        1 - exp(-u)
    js_divergence     ln 2 + log sigmoid(u)
    alpha_divergence  (exp((a - 1) u) - 1) / (a - 1); u for a = 1

Alpha as TRL 1.16 has it: a = 1 is the reverse and a = 0 the forward KL divergence. TRL up to 0.24
has 1 - a in its place. Exponents end at 80, as TRL's do for alpha; without this, `forward_kl`
overflows in TRL.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_prefix.objectives.record import Option, log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_EXPONENT = 80.0
SAME_AS_REVERSE = 1e-6
"""Distance of alpha from 1 below which the alpha divergence is the reverse KL divergence."""

DIVERGENCE = {
    "f_divergence_type": Option(default="reverse_kl", of_all=True),
    "f_alpha_divergence_coef": Option(default=0.5, needs=("f_divergence_type", "alpha_divergence")),
}
"""The options of an objective that takes `divergence_scores` of its log-ratios."""


def divergence_scores(
    logratios: Tensor, f_divergence_type: str, f_alpha_divergence_coef: float
) -> Tensor:
    """f' of the ratios whose logarithms these are; see this module's head."""
    if f_divergence_type == "forward_kl":
        return 1 - (-logratios).clamp(max=LARGEST_EXPONENT).exp()
    if f_divergence_type == "js_divergence":
        return math.log(2) + log_sigmoid(logratios)
    distance = f_alpha_divergence_coef - 1
    if f_divergence_type == "reverse_kl" or abs(distance) < SAME_AS_REVERSE:
        return logratios
    assert f_divergence_type == "alpha_divergence", f_divergence_type
    return ((distance * logratios).clamp(max=LARGEST_EXPONENT).exp() - 1) / distance

"""First-step check: policy and reference are one model, so rewards and loss are known."""

from __future__ import annotations

import torch

from megatron_prefix.distributed import World
from megatron_prefix.errors import RunError
from megatron_prefix.objectives import Objective
from megatron_prefix.reference import Reference

TOLERANCE = 1e-5
"""Of a reward."""


def check_first_step(
    loss: float, logs: list[dict], objective: Objective, reference: Reference, world: World
) -> None:
    """Raise RunError unless all rewards are 0 and the loss is the objective's first value.

    A reward may be off by `TOLERANCE`, and by |ref_logp| times the reference's relative rounding,
    in units of reward; the loss by that times its steepness, if that is above 1, and per token if
    the objective divides by tokens. Collective; `logs` are those of this rank's rows.
    """
    # beta 0.1, a relative rounding of 2^-20, a response of -200 nats: its reward may be off by 1e-5
    # + 0.1 * 200 * 2^-20 = 2.9e-5.
    scale = objective.rewards_per_nat
    rewards = scale * torch.cat([log["logratios"] for log in logs])
    ref_logps = torch.cat([log["ref_logps"] for log in logs])
    budgets = TOLERANCE + scale * reference.rounding * ref_logps
    shares = budgets
    if objective.is_first_per_token:
        shares = budgets / torch.cat([log["tokens"] for log in logs])
    worst = [
        x.max() if len(x) else rewards.new_zeros(())
        for x in (rewards / budgets, rewards, budgets, shares)
    ]
    excess, reward, budget, share = world.max(torch.stack(worst)).tolist()
    expected = objective.first_value
    tolerance = share * max(1.0, objective.first_steepness)
    is_expected = expected is None or abs(loss - expected) <= tolerance
    if excess <= 1 and is_expected:
        return
    known = f"rewards of 0 (within {budget:.1e})"
    if expected is not None:
        formula = objective.first_formula
        known = f"a loss of {formula} = {expected:.8f} (within {tolerance:.1e}) and {known}"
    raise RunError(
        f"the first loss is {loss:.8f} and the largest reward {reward:.2e}, but loss.loss_type: "
        f"{objective.name} must start with {known}, because policy and "
        "reference are the same model at the first step. Their forward passes differ, so the run "
        "would learn from wrong rewards. Try model.attention_backend: dense to see whether "
        "attention is the cause"
    )

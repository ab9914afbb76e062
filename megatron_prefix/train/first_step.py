"""The first step's loss is known: policy and reference are one model, so it is ln 2."""

from __future__ import annotations

import math

import torch

from megatron_prefix.config.schema import Config
from megatron_prefix.distributed.world import World
from megatron_prefix.errors import RunError
from megatron_prefix.reference.reference import Reference

TOLERANCE = 1e-5


def check_first_loss(
    loss: float, logs: list[dict], config: Config, reference: Reference, world: World
) -> None:
    """Raise RunError unless all rewards are 0 and the loss is ln 2.

    A reward may be off by 1e-5, and by beta |logp| times the reference's relative rounding.
    Collective; `logs` are this rank's rows'.
    """
    rewards = torch.cat([log["rewards"] for log in logs])
    ref_logps = torch.cat([log["ref_logps"] for log in logs])
    budgets = TOLERANCE + config.loss.beta * reference.rounding * ref_logps
    worst = [
        x.max() if len(x) else rewards.new_zeros(()) for x in (rewards / budgets, rewards, budgets)
    ]
    excess, reward, budget = world.max(torch.stack(worst)).tolist()
    if excess <= 1 and abs(loss - math.log(2)) <= budget:
        return
    raise RunError(
        f"the first loss is {loss:.8f} and the largest reward {reward:.2e}, where "
        f"ln 2 = {math.log(2):.8f} and rewards of 0 (within {budget:.1e}) were expected, because "
        "policy and reference are the same model at the first step: their forward passes differ, "
        "so nothing this run learned could be trusted. Try model.attention_backend: dense to see "
        "whether attention is to blame"
    )

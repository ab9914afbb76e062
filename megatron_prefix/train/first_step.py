"""First-step check: policy and reference are one model, so rewards and loss are known.

A run that starts from an adapter, with the base as reference, has two models. There the loss is
compared with the objective's value at the log-probabilities of a forward pass alone.
"""

from __future__ import annotations

import torch

from megatron_prefix.distributed import World
from megatron_prefix.engine import TrainBatch, score_rows
from megatron_prefix.errors import RunError
from megatron_prefix.objectives import Objective
from megatron_prefix.reference import Reference
from megatron_prefix.train.rounding import BEND, DEVIATIONS, TOLERANCE

LARGEST_MEAN = 1.0
"""Of the first rewards of a reward model whose head is drawn."""


def reward_start_note(mean: float) -> str | None:
    """A warning if the first rewards of a drawn head are far from 0 on average, else None.

    There is no first value of a reward model's loss, because its head is drawn at random; but
    rewards of one sign are a constant that most losses ignore, and regression has to unlearn.
    """
    if abs(mean) < LARGEST_MEAN:
        return None
    return (
        f"the rewards of the first step are {mean:.3f} on average, and a drawn head should give "
        f"less than {LARGEST_MEAN:g}: lower model.init_method_std, or set "
        "loss.center_rewards_coefficient if the loss takes it"
    )


@torch.no_grad()
def value_of_scores(
    chunks: list[torch.nn.Module], batches: list[TrainBatch], objective: Objective, world: World
) -> float:
    """The objective's value at the log-probabilities that a forward pass gives `batches`, and at
    those of the reference, which they have; collective."""
    shares = [
        objective.loss(batch.loss_inputs(scores), batch.denominators)[0]
        for batch, scores in zip(batches, score_rows(chunks, batches), strict=True)
    ]
    return float(world.sum(torch.stack(shares).sum()))


def check_first_value(loss: float, value: float, objective: Objective, world: World) -> None:
    """Raise RunError unless the first loss is `value`, that of `value_of_scores`; print both."""
    if abs(loss - value) > TOLERANCE * max(1.0, abs(value)):
        raise RunError(
            f"the first loss is {loss:.8f}, but loss.loss_type: {objective.name} has the value "
            f"{value:.8f} at the log-probabilities of lora.adapter and of the base: the forward "
            "pass of training differs from that of scoring, so the run would learn from wrong "
            "rewards. Try model.attention_backend: dense to see whether attention is the cause"
        )
    if world.is_main:
        print(
            f"first loss {loss:.8f}: policy (lora.adapter) and reference (base) differ, so no "
            f"value is known in advance; at their log-probabilities the objective is {value:.8f}",
            flush=True,
        )


def check_first_step(
    loss: float, logs: list[dict], objective: Objective, reference: Reference, world: World
) -> None:
    """Raise RunError unless all rewards are 0 and the loss is that of the reference itself.

    A reward may be off by `TOLERANCE`, and by `DEVIATIONS` times the response's noise times the
    reference's relative rounding, in units of reward. The loss may be off by what these budgets
    change of it, to first order. Collective; `logs` are those of this rank's rows, from
    `preference_loss` with `is_first`.
    """
    # beta 0.1, a relative rounding of 2^-8, a response of 400 tokens whose scales are 5: its noise
    # is 5 * sqrt(400) = 100, so its reward may be off by 1e-5 + 8 * 0.1 * 100 * 2^-8 = 0.31.
    scale = objective.rewards_per_nat
    rewards, noise, slopes = (
        torch.cat([log[name] for log in logs]) for name in ("logratios", "noise", "slopes")
    )
    rewards = scale * rewards
    budgets = TOLERANCE + DEVIATIONS * scale * reference.rounding * noise
    worst = [
        x.max() if len(x) else rewards.new_zeros(()) for x in (rewards / budgets, rewards, budgets)
    ]
    excess, reward, budget = world.max(torch.stack(worst)).tolist()
    start = torch.stack([log["start"] for log in logs]).sum()
    bound = (slopes * budgets).sum() / scale
    expected, change = world.sum(torch.stack([start, bound])).tolist()
    tolerance = TOLERANCE + BEND * change
    is_expected = not objective.has_first_value or abs(loss - expected) <= tolerance
    if excess <= 1 and is_expected:
        return
    known = f"rewards of 0 (within {budget:.1e})"
    if objective.has_first_value:
        formula = objective.first_formula
        known = f"a loss of {formula} = {expected:.8f} (within {tolerance:.1e}) and {known}"
    raise RunError(
        f"the first loss is {loss:.8f} and the largest reward {reward:.2e}, but loss.loss_type: "
        f"{objective.name} must start with {known}, because policy and "
        "reference are the same model at the first step. Their forward passes differ, so the run "
        "would learn from wrong rewards. Try model.attention_backend: dense to see whether "
        "attention is the cause"
    )

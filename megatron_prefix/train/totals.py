"""What a step logs: loss, mean of every metric and token counts, of all ranks."""

from __future__ import annotations

import torch

from megatron_prefix.data.steps import MicroBatch, Sampler, Step
from megatron_prefix.distributed import World
from megatron_prefix.objectives import Objective
from megatron_prefix.train.logical import logical_tokens


def step_totals(
    plan: Step,
    rows: list[MicroBatch],
    logs: list[dict],
    sampler: Sampler,
    objective: Objective,
    world: World,
) -> tuple[dict[str, float], dict[str, int]]:
    """Loss and mean of every metric of the step, and its token counts, from one sum over ranks, in
    float64, in which all counts are exact. A metric of which the step has no entry is left out.

    `rows` and `logs` are this rank's. Collective.
    """
    counts = {
        "tokens/executed": sum(len(row.tokens) for row in rows),
        "tokens/targets": sum(len(row.logit_token) for row in rows),
        "rows/projected": sum(row.num_projected for row in rows),
    }
    names = list(logs[0]["sums"])
    losses = torch.stack([log["loss"] for log in logs]).sum()[None]
    sums = torch.stack([torch.stack([*log["sums"].values()]) for log in logs]).sum(0).flatten()
    own = torch.cat([losses, sums, torch.tensor([*counts.values()], dtype=sums.dtype).to(sums)])
    loss, *totals = world.sum(own).tolist()
    pairs = zip(totals[0 : 2 * len(names) : 2], totals[1 : 2 * len(names) : 2], strict=True)
    means = {"loss": loss} | objective.logged(dict(zip(names, pairs, strict=True)))
    means |= _extremes(logs, world)
    logical = logical_tokens(sampler.dataset, plan.groups, objective.needs_sets)
    summed = {key: int(x) for key, x in zip(counts, totals[2 * len(names) :], strict=True)}
    if sampler.oversized == "split":
        summed["tokens/repeated"] = plan.repeated_tokens
    return means, {"tokens/logical": logical, **summed}


def _extremes(logs: list[dict], world: World) -> dict[str, float]:
    """Largest and least values of the step, of all ranks."""
    names = list(logs[0]["extremes"])
    if not names:
        return {}
    rows = torch.stack([torch.stack([*log["extremes"].values()]) for log in logs])
    largest = world.max(rows.amax(dim=0)).tolist()
    return {
        name: -x if name.endswith("/min") else x for name, x in zip(names, largest, strict=True)
    }

"""The two passes of a step whose objective looks at all of its responses (engine/table.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_prefix.data.steps import MicroBatch
from megatron_prefix.distributed import World
from megatron_prefix.engine import StepRows, TrainBatch, score_rows
from megatron_prefix.errors import RunError
from megatron_prefix.objectives import Objective
from megatron_prefix.train.rounding import TOLERANCE


@dataclass(frozen=True, kw_only=True, eq=False)
class FirstPass:
    """What the first pass over a step leaves on this rank.

    `scores` are the values of each row; `batches` the same rows with the slopes of the loss. `logs`
    has one entry: the step's loss and metrics on the first data-parallel rank, zeros on the others,
    so that their sum over ranks is the step's. `starts` has, in the first step of a run, for each
    row its `start` and `slopes` as `preference_loss` returns them, which sum to the step's.
    `running_rewards` are those of the run with this step.
    """

    scores: list[Tensor]
    batches: list[TrainBatch]
    logs: list[dict]
    starts: list[dict]
    running_rewards: tuple[float, float]
    not_finite: list[str]
    """The responses of the step, on any rank, whose log-probability under policy or reference is
    not finite. If there are any, there is no loss: no logs, and rows without slopes."""


def first_pass(
    chunks: Sequence[torch.nn.Module],
    step: StepRows,
    batches: list[TrainBatch],
    objective: Objective,
    world: World,
    *,
    running_rewards: tuple[float, float] = (0.0, 0.0),
    is_first: bool = False,
) -> FirstPass:
    """Score the rows, gather the step's table, and evaluate the objective on it. Collective.

    `batches` are the step's rows with the reference, `running_rewards` those of the steps before.
    """
    table = step.table
    assert table is not None, "the feed was made without tables"
    scores = scores_in_evaluation(chunks, batches)
    own = table.gather(scores, world)
    reference = None
    if objective.reference != "none":
        reference = table.gather([batch.reference_scores() for batch in batches], world)
    bad = ~own.isfinite() if reference is None else ~(own.isfinite() & reference.isfinite())
    if bad.any():
        names = table.responses(bad.numpy())
        return FirstPass(
            scores=scores,
            batches=batches,
            logs=[],
            starts=[],
            running_rewards=running_rewards,
            not_finite=names,
        )
    references = table.gather_references(batches, world)
    loss = table.loss(objective, own, reference, references, running_rewards, batches[0].kl)
    device = batches[0].tokens.device
    sloped = [
        batch.with_slopes(loss.slopes[torch.from_numpy(places)].to(device))
        for batch, places in zip(batches, table.places, strict=True)
    ]
    starts: list[dict] = [{} for _ in batches]
    if is_first and reference is not None:
        start, slopes = objective.start(loss.inputs, table.denominators)
        share = start.to(device) if world.data_rank == 0 else torch.zeros_like(start, device=device)
        for i, (places, batch) in enumerate(zip(table.places, batches, strict=True)):
            entries = torch.from_numpy(places[: len(batch.response_tokens)])
            whole = share if i == 0 else torch.zeros_like(share)
            starts[i] = {"start": whole, "slopes": slopes[entries].to(device)}
    logs = of_one_rank(loss.logs, world)
    return FirstPass(
        scores=scores,
        batches=sloped,
        logs=[logs],
        starts=starts,
        running_rewards=loss.running_rewards,
        not_finite=[],
    )


def scores_in_evaluation(
    chunks: Sequence[torch.nn.Module], batches: list[TrainBatch]
) -> list[Tensor]:
    """`score_rows` by models in evaluation mode, which are then as they were."""
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    scores = score_rows(chunks, batches)
    for chunk, training in zip(chunks, was_training, strict=True):
        chunk.train(training)
    return scores


def of_one_rank(logs: dict, world: World) -> dict:
    """The step's values as those of a row of the first data-parallel rank; zeros elsewhere."""

    def share(value: Tensor) -> Tensor:
        value = value.to(world.device)
        return value if world.data_rank == 0 else torch.zeros_like(value)

    return {
        "loss": share(logs["loss"]),
        "sums": {name: share(value) for name, value in logs["sums"].items()},
        "extremes": {name: value.to(world.device) for name, value in logs["extremes"].items()},
    }


def check_passes(
    rows: list[MicroBatch],
    first: list[Tensor],
    second: list[Tensor],
    rounding: float,
    world: World,
) -> float:
    """The largest difference between the log-probabilities of both passes, in nats, over all
    ranks. Collective.

    Raises RunError if one is above `TOLERANCE` and `rounding` times the log-probability: then the
    slopes belong to other values than those whose gradient was computed.
    """
    device = world.device
    a, b = (torch.cat([torch.zeros(1, device=device).double(), *x]) for x in (first, second))
    difference = (a - b).abs()
    excess = difference / (TOLERANCE + rounding * a.abs())
    own = torch.stack([difference.max(), excess.max()])
    largest, excess_of_all = world.max(own.clone()).tolist()
    if excess_of_all <= 1:
        return largest
    worst = row_response(rows, [len(values) for values in second], int(excess.argmax()) - 1)
    reports = world.gather((float(excess.max()), worst))
    raise RunError(
        f"the two passes over a step give a response other log-probabilities: {max(reports)[1]} "
        f"differs by {largest:.2e} nats, {excess_of_all:.1f} times what rounding allows. A forward "
        "pass must not depend on whether gradients are computed: try model.attention_backend: "
        "dense to see whether attention is the cause"
    )


def row_response(rows: list[MicroBatch], sizes: list[int], place: int) -> str:
    """The response of value `place` of all rows' values, `sizes` of each; of a head or an
    alignment, the groups of its row."""
    for row, size in zip(rows, sizes, strict=True):
        if place >= size:
            place -= size
            continue
        if place < row.num_responses:
            group, response = row.response_ids[max(place, 0)]
            return f"group {group}, response {response},"
        groups = ", ".join(map(str, np.unique(row.response_ids[:, 0])))
        return f"a response of the groups {groups}"
    return "no response"

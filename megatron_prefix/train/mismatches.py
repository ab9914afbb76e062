"""The mismatches of each step: responses of other prompts, of which only a mean is needed.

The KL that `kto` subtracts is the mean log-ratio of a step's mismatches, without gradient, and the
loss of a response depends on nothing else outside its row. So a step begins with a forward pass of
the policy over prompts and mismatches, and then runs as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_prefix.data.steps import MicroBatch, Sampler
from megatron_prefix.distributed import World
from megatron_prefix.engine import Feed, Policy, StepRows, TrainBatch
from megatron_prefix.model import unwrap
from megatron_prefix.reference import Reference
from megatron_prefix.train.joint_reference import JointScores
from megatron_prefix.train.two_passes import scores_in_evaluation


@dataclass(frozen=True, kw_only=True, eq=False)
class MismatchPass:
    """What a forward pass over the mismatches of a step gives."""

    rows: list[MicroBatch]
    """Those of this rank."""
    scores: list[Tensor]
    """The log-probability of each row's mismatches."""
    kl: Tensor
    """`LossInputs.kl` of the step, the same on all ranks; on the CPU."""
    not_finite: list[str]
    """The mismatches, on any rank, whose log-probability is not finite, as text."""


class MismatchSteps:
    """The mismatches of the steps of a run, and the reference of all rows of these steps."""

    def __init__(
        self,
        *,
        sampler: Sampler,
        mismatches: Sampler,
        joint: Sampler | None,
        policy: Policy,
        reference: Reference,
        world: World,
        num_steps: int,
    ) -> None:
        """`mismatches` and `joint` are as `mismatch_sampler` and `joint_sampler` make them of the
        run's `sampler`."""
        self._dataset = sampler.dataset
        self._policy, self._reference, self._world = policy, reference, world
        config = unwrap(policy.chunks[0]).config
        self._mismatches = mismatches
        self._feeds = [
            Feed(each, world, config, num_steps, with_table=True)
            for each in (mismatches, joint)
            if each is not None
        ]

    def attach(
        self, number: int, rows: list[MicroBatch], batches: list[TrainBatch]
    ) -> tuple[list[TrainBatch], MismatchPass]:
        """Rows of step `number`, counted from 0, with their reference and the KL of the step's
        mismatches; and these. Collective."""
        step, *joint_steps = [feed.step(number) for feed in self._feeds]
        attach: Callable[..., list[TrainBatch]] = partial(self._reference.attach, step=number)
        for joint in joint_steps:
            stored = self._dataset.stored
            attach = JointScores.scored(self._reference, joint, stored, self._world).attach
        scored = attach(step.rows, step.batches, dataset=self._mismatches.dataset)
        mismatches = mismatch_pass(self._policy.chunks, step, scored, self._world)
        kl = mismatches.kl.to(self._world.device)
        own = attach(rows, batches, dataset=self._dataset)
        return [batch.with_kl(kl) for batch in own], mismatches

    def close(self) -> None:
        for feed in self._feeds:
            feed.close()


def mismatch_pass(
    chunks: Sequence[torch.nn.Module], step: StepRows, batches: list[TrainBatch], world: World
) -> MismatchPass:
    """Score the mismatches of a step; `step` and `batches` are their rows, with the reference.
    Collective."""
    table = step.table
    assert table is not None, "the feed was made without tables"
    scores = scores_in_evaluation(chunks, batches)
    reference = table.gather([batch.reference_scores() for batch in batches], world)
    logratios = table.gather(scores, world) - reference
    bad = ~logratios.isfinite().numpy()
    return MismatchPass(
        rows=step.rows,
        scores=scores,
        kl=mean_kl(logratios),
        not_finite=[f"the mismatch of group {x}" for x in table.columns.response_ids[bad, 0]],
    )


def mean_kl(logratios: Tensor) -> Tensor:
    """max(0, mean log-ratio of the mismatches of a step), 0 without any."""
    if not len(logratios):
        return torch.zeros((), dtype=torch.float64)
    return logratios.mean().clamp(min=0)
